"""`megatron-sffn COMMAND ...`: the commands of the package by name.

Inputs: a command's name and its flags. Outputs: what that command prints, and its exit code; the
list of commands, by what they are for, without a command; and the version with `--version`.

Design notes: this process becomes `python -m` of the command's module, so that workers, signals and
exit codes are as in the clone. It imports the standard library alone, so that the list, the version
and a typo are answered in milliseconds. The scripts of tools/ are in the package as
`megatron_sffn.tools`, a link in the clone.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_sffn.utils.errors import CommandParser, ConfigError, run_command

PACKAGE = Path(__file__).parent

RENAMED = {"import_model": "import"}
"""File of tools/ -> its command, where the file cannot have the command's name."""

GROUPS = {
    "before a run": ("doctor", "accounting", "plan"),
    "text to token ids": (
        "train-tokenizer",
        "preprocess-data",
        "split-dataset",
        "dedup-dataset",
        "merge-datasets",
        "inspect-dataset",
        "build-index-cache",
    ),
    "training, and its results": ("pretrain", "analyze-routing", "compare"),
    "a trained model": ("generate", "eval", "export", "import", "convert-checkpoint"),
    "studies of many runs": ("sweep", "report"),
}
"""Heading in the list of commands -> its commands, in the order in which a user needs them."""

EXAMPLE = """\
training is started by torchrun: torchrun --nproc-per-node N -m megatron_sffn.pretrain ...
a command's own flags: megatron-sffn COMMAND --help
"""


def commands() -> dict[str, Path]:
    """Command -> the file that implements it, in the order of `GROUPS`."""
    files = {
        RENAMED.get(path.stem, path.stem).replace("_", "-"): path
        for path in (PACKAGE / "tools").glob("*.py")
    }
    files["doctor"] = PACKAGE / "doctor" / "__main__.py"
    files["pretrain"] = PACKAGE / "pretrain.py"
    return {name: files[name] for names in GROUPS.values() for name in names}


def module_of(path: Path) -> str:
    """The module name of a file of the package, for `python -m`."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__main__")


def summary(path: Path) -> str:
    """The first line of a file's docstring."""
    with path.open() as file:
        return file.readline().strip().strip('"')


def version() -> str:
    """The version of this package; if it is not installed, that in the clone's pyproject.toml."""
    import importlib.metadata

    try:
        return importlib.metadata.version("megatron-sffn")
    except importlib.metadata.PackageNotFoundError:
        import tomllib

        project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
        return str(project["version"])


def build_parser() -> argparse.ArgumentParser:
    """A parser of the command's name, which leaves the rest to the command."""
    known = commands()
    width = max(map(len, known))
    listed = "\n\n".join(
        "\n".join([f"{heading}:", *(f"  {name:{width}}  {summary(known[name])}" for name in names)])
        for heading, names in GROUPS.items()
    )
    parser = CommandParser(
        prog="megatron-sffn",
        usage="megatron-sffn COMMAND [flags of the command]",
        description=f"Pretraining with sparse feed-forward layers on Megatron.\n\n{listed}",
        epilog=EXAMPLE,
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    parser.add_argument("command", nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("flags", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Replace this process by the command.

    Raises:
        ConfigError: if there is no such command.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.version:
        print(f"megatron-sffn {version()}")
        return 0
    if args.command is None:
        parser.print_help()
        return 0
    known = commands()
    if args.command not in known:
        similar = difflib.get_close_matches(args.command.replace("_", "-"), known, n=1)
        suggestion = f"did you mean {similar[0]}? " if similar else ""
        raise ConfigError(
            f"{args.command!r} is no command of megatron-sffn; {suggestion}megatron-sffn --help "
            "lists all commands"
        )
    os.execv(sys.executable, [sys.executable, "-m", module_of(known[args.command]), *args.flags])


def run() -> None:
    """The console script."""
    run_command(main)
