"""Refuses checkpoints whose pickles name code that would run when they are loaded.

Inputs: the folder of an iteration.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_sffn.checkpoints.pickle_scan import TRUST_FLAG, foreign_code
from megatron_sffn.checks.problem import Problem, run_checks
from megatron_sffn.patches.unpickling import trusted


def check_data_only(folder: Path) -> None:
    """Scan everything of an iteration that would be unpickled.

    Raises:
        ConfigError: if loading would run code, and `patches.unpickling.trust` was not called.
    """
    run_checks(CHECKS, folder)


def code_in_checkpoint(folder: Path) -> Iterator[Problem]:
    """Code in a checkpoint, unless the user trusts it."""
    if trusted():
        return
    for file, name in foreign_code(folder):
        yield Problem(
            "checkpoint",
            folder,
            f"names {name} in {file}, which is code that would run as it is loaded",
            f"load another one, or add {TRUST_FLAG} if you trust who made it",
        )


CHECKS = (code_in_checkpoint,)
