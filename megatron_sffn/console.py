"""`megatron-sffn COMMAND ...`: the commands of the package by name, where there is no clone.

Enters: a command's name and its flags. Leaves: what that command prints, and its exit code.

Choice: this process becomes `python -m` of the command's module, so that workers, signals and exit
codes are as in the clone. The scripts of tools/ are in the package as `megatron_sffn.tools`, a link
in the clone.
"""

from __future__ import annotations

import argparse
import ast
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_sffn.errors import CommandParser, run_command

PACKAGE = Path(__file__).parent

EXAMPLE = """\
training is started by torchrun: torchrun --nproc-per-node N -m megatron_sffn.pretrain ...
a command's own flags: megatron-sffn COMMAND --help
"""


def commands() -> dict[str, Path]:
    """Name -> file."""
    tools = {path.stem.replace("_", "-"): path for path in (PACKAGE / "tools").glob("*.py")}
    doctor = {"doctor": PACKAGE / "doctor" / "__main__.py"}
    return {**doctor, "pretrain": PACKAGE / "pretrain.py", **dict(sorted(tools.items()))}


def module_of(path: Path) -> str:
    """What `python -m` is given for a file of the package."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__main__")


def summary(path: Path) -> str:
    """The first line of a file's docstring."""
    return (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()[0]


def build_parser() -> argparse.ArgumentParser:
    """The command's name; all that follows is the command's."""
    known = commands()
    width = max(map(len, known))
    listed = "\n".join(f"  {name:{width}}  {summary(path)}" for name, path in known.items())
    parser = CommandParser(
        prog="megatron-sffn",
        usage="megatron-sffn COMMAND [flags of the command]",
        description=f"Pretraining with sparse feed-forward layers on Megatron.\n\n{listed}",
        epilog=EXAMPLE,
    )
    parser.add_argument("command", choices=list(known), metavar="COMMAND", help="one of the above")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Become the command that is named."""
    args = build_parser().parse_args(argv)
    module = module_of(commands()[args.command])
    os.execv(sys.executable, [sys.executable, "-m", module, *args.flags])


def run() -> None:
    """The console script."""
    run_command(main)
