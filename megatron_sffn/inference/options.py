"""Flags that name a checkpoint and a layout, the same for all commands that use a model.

Design notes: this module imports nothing heavy, so that `--help` takes milliseconds.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_sffn.flags.names import flag_of

DTYPES = {"fp32": (), "bf16": ("--bf16",), "fp16": ("--fp16",)}
"""Value of `--dtype` -> Megatron's flags."""

LAYOUT_FLAGS = {
    "tensor_model_parallel_size": "TP: ranks that share every dense matrix",
    "pipeline_model_parallel_size": "PP: stages of layers",
    "expert_model_parallel_size": "EP: ranks that share the blocks of every sparse layer",
    "expert_tensor_parallel_size": "ETP: ranks that share the cells of every block",
}
"""Flag (dest) -> its help."""


def add_checkpoint_flags(add: Callable[..., Any]) -> None:
    """Add the flags that name a checkpoint and its tokenizer, and `--dtype`.

    Args:
        add: `add_argument` of a parser or of a group.
    """
    add("--load", type=Path, required=True, metavar="DIR", help="folder of the run")
    add(
        "--ckpt-step",
        type=int,
        metavar="N",
        help="iteration to load (default: the one that training would load)",
    )
    add(
        "--tokenizer-model",
        metavar="PATH",
        help="the run's tokenizer, if it is at another place than in the run",
    )
    add("--dtype", choices=list(DTYPES), help="dtype of the model (default: as in the run)")
    add(
        "--sffn-trust-checkpoint",
        action="store_true",
        help="read a checkpoint that names code other than torch's and Megatron's classes, as old "
        "checkpoints do, and let this code run",
    )


def add_model_flags(parser: ArgumentParser) -> None:
    """Add the flags that name a checkpoint and a layout, the same for all commands."""
    add_checkpoint_flags(parser.add_argument_group("the model").add_argument)
    layout = parser.add_argument_group(
        "layout",
        "With torchrun; the layout of the run does not matter. The product of TP and PP "
        "divides the number of ranks, and so does the product of EP, ETP and PP.",
    )
    for dest, text in LAYOUT_FLAGS.items():
        layout.add_argument(
            flag_of(dest), type=int, default=1, metavar="N", help=f"{text} (default: 1)"
        )
