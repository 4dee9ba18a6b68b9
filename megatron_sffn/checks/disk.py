"""Saves that would fail: too little disk space, or a way of saving that needs a GPU.

Inputs: Megatron's validated namespace, and the sparse layer's config (None for the dense baseline).
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from megatron.training.vocab_utils import calculate_padded_vocab_size

from megatron_sffn.accounting import ModelShape, count_parameters
from megatron_sffn.checkpoints.disk_space import amount, bytes_per_parameter, free_bytes
from megatron_sffn.checks.problem import Problem, run_checks
from megatron_sffn.data.tokenize.tokenizer import load_tokenizer
from megatron_sffn.nn.config import SparseFFNConfig
from megatron_sffn.patches.cpu import is_host


def check_saves(args: Namespace, sffn: SparseFFNConfig | None) -> None:
    """Run the checks of a run that saves checkpoints.

    Raises:
        ConfigError: if a checkpoint cannot be written.
    """
    if args.save is not None and not args.skip_train:
        run_checks(CHECKS, args, sffn)


def asynchronous_saves(args: Namespace, sffn: SparseFFNConfig | None) -> Iterator[Problem]:
    """Asynchronous saves without a GPU."""
    if args.async_save and is_host():
        yield Problem(
            "--async-save",
            None,
            "needs a GPU, for the process that writes meanwhile fails without one and the run "
            "would wait for it without end",
            "leave it out",
        )


def disk_space(args: Namespace, sffn: SparseFFNConfig | None) -> Iterator[Problem]:
    """Disks without space for one checkpoint."""
    if args.ckpt_format != "torch_dist" or args.enable_msc:
        return
    rows = args.padded_vocab_size or calculate_padded_vocab_size(
        load_tokenizer(args).vocab_size,
        args.make_vocab_size_divisible_by,
        args.tensor_model_parallel_size,
        False,
    )
    shape = ModelShape.of_args(Namespace(**{**vars(args), "padded_vocab_size": rows}), sffn)
    needed = bytes_per_parameter(args) * count_parameters(shape).total
    free = free_bytes(Path(args.save))
    if free < needed:
        yield Problem(
            "--save",
            args.save,
            f"has {amount(free)} free, but a checkpoint of this model has {amount(needed)}",
            "give a folder with more room",
        )


CHECKS = (asynchronous_saves, disk_space)
