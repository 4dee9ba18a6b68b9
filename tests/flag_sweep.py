"""Try every flag of `--help` once, in a run of two steps on one rank.

    python -m tests.flag_sweep                    # all flags, about an hour of one core
    python -m tests.flag_sweep --only 'moe|lr'    # flags that match

`tests/golden/flags_of_main.json` has the flags that Megatron's main has and 0.19 has not, tried in
an environment of `tests.second_megatron` with `--only ... --out tests/golden/flags_of_main.json`.

Outputs: `tests/golden/flags.json`, which has a class and an observation for each flag:

- `works`: the run computes, prints or writes something else than a run without the flag;
- `refused`: one sentence and exit code 2, before anything starts;
- `no effect`: nothing differs; either `NO_EFFECT` has the reason, or it is a bug;
- `failed`: anything else, such as a traceback.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import sys
import tempfile
import time
import traceback
import warnings
from argparse import Action
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sffn.patches import prepare

DEFAULTS = prepare()[0]

from megatron.training.arguments import add_megatron_arguments  # noqa: E402

import megatron_sffn.train.run  # noqa: E402, F401  (saves 2 s in every child)
from megatron_sffn.flags.sffn_flags import add_sffn_flags  # noqa: E402
from megatron_sffn.pretrain import main as pretrain  # noqa: E402
from megatron_sffn.utils.errors import run_command  # noqa: E402
from tests.flag_values import NEEDS, NO_EFFECT, VALUES  # noqa: E402
from tests.support.pretraining import MODEL, write_bytes  # noqa: E402

GOLDEN = Path(__file__).parent / "golden" / "flags.json"
GOLDEN_OF_MAIN = GOLDEN.with_name("flags_of_main.json")
SECONDS = 120.0
RUN = (
    "--train-iters 2 --split 80,20,0 --eval-iters 1 --save run --save-interval 2 "
    "--sffn-router switch"
)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of a run.

    Args:
        code: exit code; None if the run did not end.
        text: printed text, without times, paths and the list of arguments.
        files: names of the files that it wrote.
        sentence: the sentence of a refusal, or the last line of a traceback.
    """

    code: int | None
    text: str
    files: list[str]
    sentence: str


def run(flags: str, data: str) -> Outcome:
    """Run the command in a new process and in an empty folder."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pid = os.fork()
        if pid == 0:
            _run_command(folder, f"{MODEL} --data-path {data} {RUN} {flags}")
        deadline, status = time.monotonic() + SECONDS, None
        while status is None and time.monotonic() < deadline:
            ended_pid, wait_status = os.waitpid(pid, os.WNOHANG)
            if ended_pid:
                status = os.waitstatus_to_exitcode(wait_status)
            time.sleep(0.01)
        if status is None:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        log = (folder / "log").read_text(errors="replace")
        names = sorted(
            str(path.relative_to(folder))
            for path in folder.rglob("*")
            if path.is_file() and path.name != "log"
        )
    lines = [line for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ") or "Error" in line]
    return Outcome(
        code=status,
        text=_without_varying_text(log),
        files=names,
        sentence=(errors or lines or [""])[-1],
    )


def _run_command(folder: Path, flags: str) -> None:
    """Run the command in this child process."""
    os.setsid()
    os.chdir(folder)
    output = os.open("log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    warnings.simplefilter("ignore")
    sys.argv = ["pretrain", *shlex.split(flags)]
    code: Any = 1
    try:
        run_command(pretrain)
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


VARYING = re.compile(r"index files|time|seconds|per second|memory|\bGB\b|[\d.]+ ?m?s\b|port")
"""In lines that differ between equal runs."""


def _without_varying_text(log: str) -> str:
    """The printed text without lines that differ between equal runs."""
    log = re.sub(r"-+ arguments -+.*?-+ end of arguments -+", "arguments", log, flags=re.S)
    lines = []
    for line in log.splitlines():
        line = re.sub(r"\[?\d{4}-\d\d-\d\d[ T][\d:.]+\]?|/\S+|0x[0-9a-f]+", "", line)
        line = re.sub(r"elapsed time per iteration \(ms\): [\d.]+", "", line)
        if not VARYING.search(line):
            lines.append(line.strip())
    return "\n".join(lines)


def actions() -> Iterator[Action]:
    """Every flag of the command."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_megatron_arguments(parser)
    add_sffn_flags(parser)
    yield from (action for action in parser._actions if action.dest != "help")


def flag_of(action: Action) -> str:
    """The option string to try: the longest one that changes the default."""
    names = action.option_strings
    if isinstance(action, argparse.BooleanOptionalAction):
        negations = ("--no-", "--disable-")
        names = [name for name in names if name.startswith(negations) == bool(action.default)]
    return max(names, key=len)


def command_for(action: Action) -> str:
    """The flag with a value other than its default, and the flags that it needs."""
    flag = flag_of(action)
    needs = NEEDS.get(flag, "")
    if flag in VALUES:
        return f"{flag} {VALUES[flag]} {needs}"
    if action.nargs == 0:
        return f"{flag} {needs}"
    if action.choices:
        value = next(choice for choice in action.choices if choice != action.default)
        return f"{flag} {getattr(value, 'name', value)} {needs}"
    if action.type is int:
        return f"{flag} {(action.default or 0) + 1} {needs}"
    if action.type is float:
        return f"{flag} {(action.default or 0.0) * 1.5 + 0.25} {needs}"
    return f"{flag} x {needs}"


def classify(base: Outcome, outcome: Outcome) -> str:
    """The class of a flag, from a run without it and a run with it."""
    if outcome.code == 2 and outcome.sentence.startswith("error: ") and not outcome.files:
        return "refused"
    if outcome.code != 0:
        return "failed"
    return "works" if (outcome.text, outcome.files) != (base.text, base.files) else "no effect"


def main() -> None:
    """Try the flags, and write the table after each flag."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", default="", help="try only flags that match this regular expression"
    )
    parser.add_argument("--out", type=Path, default=GOLDEN)
    options = parser.parse_args()
    table = json.loads(options.out.read_text()) if options.only and options.out.exists() else {}
    base_runs: dict[str, Outcome] = {}
    with tempfile.TemporaryDirectory() as name:
        data = write_bytes(Path(name) / "text", [Path(__file__)] * 20)
        for action in actions():
            flag = flag_of(action)
            if not re.search(options.only, flag):
                continue
            needs = NEEDS.get(flag, "")
            if needs not in base_runs:
                base_runs[needs] = run(needs, data)
            command = command_for(action)
            outcome = run(command, data)
            kind = classify(base_runs[needs], outcome)
            entry = {"tried": command.strip(), "class": kind}
            if kind in ("refused", "failed"):
                sentence = outcome.sentence.removeprefix("error: ").replace(data, "DATA")
                entry["sentence"] = sentence[:400]
            if kind == "no effect":
                reasons = (reason for reason, flags in NO_EFFECT.items() if flag in flags.split())
                entry["reason"] = next(reasons, "")
            table[flag] = entry
            print(f"{kind:10} {command}  {entry.get('sentence', '')[:150]}", flush=True)
            options.out.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
