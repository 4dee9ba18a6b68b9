"""Command lines that pages show, and what the commands' own parsers say of them.

Inputs: the text of a page. Outputs: a sentence for a command line that would be refused.

Design notes: the module of a command runs as `python -m` would run it, and ends when its parser has
read the command line. So the parser is the one of the command, wherever its code makes it. An
ellipsis or text in brackets stands for further flags: then none is required, and so in code font,
where a sentence names a command.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import re
import runpy
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

from torch.distributed.run import get_args_parser

from megatron_sffn import cli
from megatron_sffn.utils.errors import ConfigError
from tests.support.paths import ROOT

ELISION = re.compile(r"\.\.\.|\[[^\]]*\]|…")
PASS_ON = ("accounting", "build_index_cache", "import_model", "plan")
"""Tools that hand flags which are not their own to the parser of a run."""

MAKEFILE = (ROOT / "Makefile").read_text()
PARSE_ARGS = argparse.ArgumentParser.parse_args
PARSE_KNOWN_ARGS = argparse.ArgumentParser.parse_known_args


class Parsed(SystemExit):
    """Ends a command, with exit code 0, when its parser has read the command line."""

    def __init__(self, parser: argparse.ArgumentParser, rest: list[str], problem: str) -> None:
        super().__init__(0)
        self.parser, self.rest, self.problem = parser, rest, problem


@dataclass(frozen=True)
class CommandLine:
    """A command line of a page: its words, and whether flags are left out of it."""

    words: tuple[str, ...]
    elided: bool

    def __str__(self) -> str:
        return " ".join(self.words)


def command_lines(page: str) -> Iterator[CommandLine]:
    """The commands in the code blocks and in the code font of a page."""
    fence = re.compile(r"^ *```\w*\n(.*?)^ *```", flags=re.DOTALL | re.MULTILINE)
    spans = re.findall(r"`([^`]+)`", fence.sub("", page))
    lines = "\n".join(fence.findall(page)).replace("\\\n", " ").splitlines()
    for text, in_sentence in [(line, False) for line in lines] + [(span, True) for span in spans]:
        words = _words(ELISION.sub(" ", text))
        if words:
            yield CommandLine(tuple(words), in_sentence or bool(ELISION.search(text)))


def _words(text: str) -> list[str]:
    """The words of a command, without a prompt and variables before it and pipes after it."""
    try:
        words = shlex.split(text, comments=True)
    except ValueError:  # no closing quotation: prose
        return []
    while words and re.match(r"\$$|\w+=", words[0]):
        words.pop(0)
    ends = [words.index(end) for end in ("|", "&&", ">", ";") if end in words]
    return words[: min(ends, default=len(words))]


def problem_of(command: CommandLine) -> str | None:
    """What the parsers say against a command line; None if they accept it, or if it is not ours."""
    program, *words = command.words
    match program.removeprefix(".venv/bin/"):
        case "torchrun" if "-m" in words:
            try:
                with mock.patch.object(argparse.ArgumentParser, "error", _reject):
                    run = get_args_parser().parse_args(words)
            except ConfigError as error:
                return str(error)
            return _problem_of_python(
                ["-m", run.training_script, *run.training_script_args], command
            )
        case "python":
            return _problem_of_python(words, command)
        case "megatron-sffn" if words and not words[0].startswith("-"):
            return _problem_of_tool(words, command)
        case "make":
            return _problem_of_make(words, command)
        case script if re.match(r"examples/(launch|configs)/\w+\.sh", script):
            flags = [*itertools.dropwhile(lambda word: not word.startswith("--"), words)]
            return _problem("megatron_sffn.pretrain", flags, elided=True)
    return None


def _reject(_: argparse.ArgumentParser, message: str) -> NoReturn:
    """What a parser of argparse does in a test, in place of leaving the process."""
    raise ConfigError(message)


def _problem_of_tool(words: Sequence[str], command: CommandLine) -> str | None:
    name, *flags = words
    if name == "COMMAND":  # of any command
        return None
    if name not in cli.commands():
        return f"megatron-sffn has no command {name}"
    return _problem(cli.module_of(cli.commands()[name]), flags, command.elided)


def _problem_of_python(words: Sequence[str], command: CommandLine) -> str | None:
    """What is wrong with `python WORDS`: a module or script of ours, and its flags."""
    options = list(words)
    while options and options[0] in ("-W", "-u", "-X"):
        options = options[1 if options[0] == "-u" else 2 :]
    if options[:1] == ["-m"] and len(options) > 1:
        return _problem(options[1], options[2:], command.elided)
    if options and options[0].endswith(".py"):
        module = options[0].removesuffix(".py").replace("/", ".")
        return _problem(module, options[1:], command.elided)
    return None


def _problem_of_make(words: Sequence[str], command: CommandLine) -> str | None:
    """What is wrong with `make TARGET... NAME=VALUE`: the targets, and the flags in ARGS."""
    targets = [word for word in words if "=" not in word and word != "TARGET"]
    for target in targets:
        if not re.search(rf"^{re.escape(target)}:", MAKEFILE, re.MULTILINE):
            return f"make has no target {target}"
    for word in words:
        if word.startswith("ARGS="):
            rule = MAKEFILE.split(f"\n{targets[0]}:")[1].split("\n\n")[0]
            module = re.search(r"-m ([\w.]+) .*\$\(ARGS\)", rule)
            flags = shlex.split(word.removeprefix("ARGS="))
            return _problem(module[1], flags, command.elided) if module else f"{word} has no effect"
    return None


def _problem(module: str, flags: Sequence[str], elided: bool) -> str | None:
    """What is wrong with the flags of a module that is run as a command."""
    if "COMMAND" in module or {"--help", "--help-all"} & set(flags):
        return None
    if module not in modules_with_flags():
        is_ours = (ROOT / module.partition(".")[0]).is_dir()
        return f"there is no {module}" if is_ours and not _file_of(module).exists() else None
    parsed = run_until_parsed(module, flags, elided=elided)
    if parsed.problem or not parsed.rest:
        return parsed.problem or None
    if module.rpartition(".")[2] in PASS_ON:
        return _problem("megatron_sffn.pretrain", parsed.rest, elided=True)
    return f"{module} does not know {' '.join(parsed.rest)}"


def _file_of(module: str) -> Path:
    """The file that `python -m` runs."""
    path = ROOT / module.replace(".", "/")
    return path / "__main__.py" if path.is_dir() else path.with_suffix(".py")


def run_until_parsed(module: str, flags: Sequence[str], *, elided: bool = False) -> Parsed:
    """Run a module as a command until its parser has read the flags.

    Args:
        module: as `python -m` takes it.
        flags: the words after it.
        elided: required flags may be absent.
    """

    def stop(parser: argparse.ArgumentParser, args: Any = None, _: Any = None) -> NoReturn:
        if elided:
            _require_nothing(parser)
        rest, problem = [], ""
        with mock.patch.multiple(
            argparse.ArgumentParser,
            parse_args=PARSE_ARGS,
            parse_known_args=PARSE_KNOWN_ARGS,
            error=_reject,
        ):
            try:
                rest = PARSE_KNOWN_ARGS(parser, args)[1]
            except ConfigError as error:
                problem = str(error)
        raise Parsed(parser, rest, problem)

    with (
        mock.patch.multiple(argparse.ArgumentParser, parse_args=stop, parse_known_args=stop),
        mock.patch.object(sys, "argv", [module, *flags]),
        mock.patch.dict(os.environ),
    ):
        try:
            runpy.run_path(str(_file_of(module)), run_name="__main__")
        except Parsed as parsed:
            return parsed
    raise AssertionError(f"python -m {module} has read no command line")


def _require_nothing(parser: argparse.ArgumentParser) -> None:
    """Let a parser and those of its subcommands accept a part of a command line."""
    for required in (*parser._actions, *parser._mutually_exclusive_groups):
        required.required = False
    for subparser in _subparsers(parser):
        _require_nothing(subparser)


def _subparsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.values()


def option_strings(parser: argparse.ArgumentParser) -> Iterator[tuple[str, ...]]:
    """The spellings of each flag of a parser and its subcommands, but those of --help."""
    for action in parser._actions:
        if action.option_strings and "--help" not in action.option_strings:
            yield tuple(action.option_strings)
    for subparser in _subparsers(parser):
        yield from option_strings(subparser)


@functools.cache
def modules_with_flags() -> list[str]:
    """The commands of the package, the benchmarks and the examples that have a parser."""
    scripts = [
        path
        for folder in ("tools", "benchmarks", "examples")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if 'if __name__ == "__main__"' in path.read_text()
        and not {"prototypes", "sections"} & set(path.parts)
    ]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in scripts]
    ours = [cli.module_of(path) for path in cli.commands().values()]
    return [*ours, *(name.removesuffix(".__main__") for name in names)]
