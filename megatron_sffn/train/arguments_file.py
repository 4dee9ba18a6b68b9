"""All flags of a run go to a file: `arguments.txt` in its folder.

Inputs: Megatron's namespace. Outputs: one line for each flag, those that the command line does not
have included.

Design notes: Megatron prints these 900 lines at the start of every run, where they bury what a
person looks for. The file is written with the first batch, because some flags are refused while
Megatron builds the model, and a refused run leaves no files.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from megatron_sffn.patches import run_hooks
from megatron_sffn.patches.registry import apply
from megatron_sffn.utils.atomic_files import atomic_write_text

ARGUMENTS = "arguments.txt"


def install() -> None:
    """Let Megatron print the flags only where `--sffn-verbose` asks for it."""
    apply(run_hooks.PRINT_ARGUMENTS, _if_verbose)


def _if_verbose(original: Callable[[str, Namespace], None]) -> Callable[[str, Namespace], None]:
    def print_arguments(title: str, args: Namespace) -> None:
        if vars(args).get("sffn_verbose", True):  # a namespace of Megatron's own parser has no flag
            original(title, args)

    return print_arguments


def write_arguments(args: Namespace, folder: Path) -> None:
    """Write the file, on rank 0."""
    if args.rank == 0:
        lines = sorted((f"{name} {value}\n" for name, value in vars(args).items()), key=str.lower)
        atomic_write_text(folder / ARGUMENTS, "".join(lines))
