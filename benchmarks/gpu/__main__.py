"""The command line of the acceptance: `python -m benchmarks.gpu {check,time,tune} --out DIR`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu import results, supervisor
from benchmarks.gpu.plan import PLANS
from megatron_sffn.utils.errors import CommandParser, ConfigError, run_command

EPILOG = """\
example: on a machine with a GPU, one after the other, without a pause
  python -m benchmarks.gpu check --out gpu-results
  python -m benchmarks.gpu time --out gpu-results
  python -m benchmarks.gpu tune --out gpu-results

example: test the program itself, without a GPU
  python -m benchmarks.gpu check --out /tmp/dry --dry-run

docs/gpu.md explains how to install on a machine without a network, and how to read the results.
"""


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = CommandParser(
        prog="python -m benchmarks.gpu",
        description="Accept a GPU: correct results (check), speed (time), tile sizes (tune).",
        epilog=EPILOG,
    )
    parser.add_argument("command", choices=PLANS)
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder of the results, at most 8 files; the three commands can share it",
    )
    parser.add_argument(
        "--seconds", type=float, default=540, help="time limit of the command (default: 540)"
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="SECTION", help="run these sections only"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="run the same program without a GPU: tiny sizes, Triton's interpreter; its times are "
        "meaningless",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 if every section passed or could not run here, else 1."""
    command = parse(argv)
    print(f"{command.name}: at most {command.seconds:.0f} s, results in {command.out}", flush=True)
    sections = supervisor.run(command)
    names = [s.name for s in PLANS[command.name] if not command.only or s.name in command.only]
    print("\n".join(["", *results.closing(sections, names)]), flush=True)
    return int(any(sections[name]["state"] in ("failed", "cut") for name in names))


def parse(argv: Sequence[str] | None) -> supervisor.Command:
    """Read and check the command line; makes the folder of the results.

    Raises:
        ConfigError: if a value cannot work.
    """
    args = build_parser().parse_args(argv)
    if not args.seconds >= 10:
        raise ConfigError(f"--seconds {args.seconds:g} is too short; give at least 10")
    section_names = [section.name for section in PLANS[args.command]]
    for name in args.only:
        if name not in section_names:
            raise ConfigError(
                f"--only {name} is no section of {args.command}; choose from "
                f"{', '.join(section_names)}"
            )
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--out {args.out} cannot be made ({error.strerror}); give the path of a folder"
        ) from None
    return supervisor.Command(
        name=args.command,
        out=args.out,
        seconds=args.seconds,
        dry=args.dry_run,
        only=tuple(args.only),
    )


if __name__ == "__main__":
    run_command(main)
