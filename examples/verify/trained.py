"""Trains a configuration at toy size on ranks of this machine, and measures what it holds.

Inputs: the flags of a script under TOY=1. Outputs: the losses of the steps, and the bytes of
weights, gradients and optimizer state of every rank.

Design notes: ranks are forked, with the environment of torchrun, and run the whole entry point, so
that a run takes seconds; a script of its own would import Megatron in each of them.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import megatron.core.tokenizers.text  # once, not in every rank: it takes seconds
import megatron.training.training

from examples.verify.configurations import Configuration
from examples.verify.held_bytes import RankBytes, bytes_of_rank
from megatron_sffn.accounting import ModelShape
from megatron_sffn.flags.sffn_flags import sffn_config
from megatron_sffn.pretrain import main
from megatron_sffn.train.first_rank import parse_as_first_rank
from tests.support.jobs import run_as_job
from tools.accounting import costs_of

STEPS, VOCABULARY = 5, 1024
"""Of every script under TOY=1."""
TOY_RANKS = 2

DENSE_LAYOUTS = {
    "DP 2": (2, ()),
    "TP 2": (2, ("--tensor-model-parallel-size", "2", "--sequence-parallel")),
    "PP 2": (2, ("--pipeline-model-parallel-size", "2")),
}
SPARSE_LAYOUTS = {
    "EP 2": (2, ("--expert-model-parallel-size", "2")),
    "TP 2, EP 2": (
        2,
        (
            *("--tensor-model-parallel-size", "2", "--sequence-parallel"),
            *("--expert-model-parallel-size", "2", "--expert-tensor-parallel-size", "1"),
        ),
    ),
    "PP 2": (2, ("--pipeline-model-parallel-size", "2")),
}
"""Name of a layout -> its ranks and flags; each is compared with one rank."""

LOSS_TOLERANCE = 1e-4
"""Largest relative difference of a loss between layouts: ranks add up fp32 numbers in other orders,
which five steps of Adam amplify."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """A finished run.

    Args:
        losses: of the steps.
        ranks: bytes of each rank.
    """

    losses: list[float]
    ranks: list[RankBytes]


def train(flags: Sequence[str], folder: Path, ranks: int = TOY_RANKS) -> Training:
    """Run the entry point on forked ranks with a folder as their working directory."""
    module = megatron.training.training

    def body() -> RankBytes:
        built: list[Any] = []
        set_up = module.setup_model_and_optimizer

        def remembered(*args: Any, **options: Any) -> Any:
            built[:] = set_up(*args, **options)
            return tuple(built)

        module.setup_model_and_optimizer = remembered
        sys.argv = ["pretrain", *flags]
        main()
        return bytes_of_rank(built[0], built[1], "--bf16" in flags)

    outputs = run_as_job(ranks, body, folder=folder, merge=True)
    losses = re.findall(r"lm loss: +([-+.\dEe]+) \|", outputs[-1].stdout)
    return Training(losses=list(map(float, losses)), ranks=[output.result for output in outputs])


def assert_trained(training: Training) -> None:
    """The losses of a run must start at that of an untrained model, and fall."""
    losses = training.losses
    assert len(losses) == STEPS, losses
    assert abs(losses[0] - math.log(VOCABULARY)) < 0.5, losses
    assert losses[-1] < losses[0] - 0.03, losses


def counted_bytes(flags: Sequence[str], ranks: int) -> RankBytes:
    """Bytes of a rank in closed form; the optimizer's are the mean over ranks."""
    args, cuda = parse_as_first_rank(flags, ranks, device="cpu")
    sffn = sffn_config(args)
    costs = costs_of(args, sffn, ModelShape.of_args(args, sffn), cuda=cuda)
    return RankBytes(
        weights=round(costs.weights),
        gradients=round(costs.gradients),
        optimizer=round(costs.optimizer),
    )


def assert_memory(training: Training, counted: RankBytes) -> None:
    """Every rank must hold the counted bytes.

    A distributed optimizer shards buffers, not weights, so only the mean of its bytes is exact.
    """
    for rank in training.ranks:
        assert (rank.weights, rank.gradients) == (counted.weights, counted.gradients), rank
    mean = sum(rank.optimizer for rank in training.ranks) / len(training.ranks)
    assert abs(mean - counted.optimizer) <= 1, f"optimizer: {mean:,.1f}, {counted.optimizer:,}"


def layouts_of(configuration: Configuration) -> dict[str, tuple[int, tuple[str, ...]]]:
    """The layouts that are compared with one rank."""
    return DENSE_LAYOUTS if configuration.is_dense else SPARSE_LAYOUTS


def comparable_flags(configuration: Configuration) -> list[str]:
    """The toy flags of a run whose losses do not depend on the layout: fp32, no dropout, no cut."""
    flags = [flag for flag in configuration.flags(TOY="1") if flag != "--bf16"]
    flags += ["--hidden-dropout", "0", "--expert-model-parallel-size", "1"]
    return flags if configuration.is_dense else [*flags, "--sffn-block-dropout", "0"]


def largest_difference(losses: Sequence[float], reference: Sequence[float]) -> float:
    """The largest relative difference between the losses of two runs of as many steps."""
    assert len(losses) == len(reference) == STEPS, (losses, reference)
    return max(abs(a / b - 1) for a, b in zip(losses, reference, strict=True))


def compare_layouts(configuration: Configuration, folder: Path) -> dict[str, float]:
    """Train on one rank and in each layout.

    Returns:
        Layout -> the largest relative difference of its losses from those of one rank.

    Raises:
        AssertionError: if one exceeds `LOSS_TOLERANCE`.
    """
    flags = comparable_flags(configuration)
    reference = train(flags, folder, ranks=1).losses
    differences = {}
    for name, (ranks, layout) in layouts_of(configuration).items():
        # Megatron's global auxiliary loss sees all replicas, and the microbatches so far: the ranks
        # must share each of them, where otherwise each has one of its own.
        if "global_aux_loss" in flags and name in ("EP 2", "DP 2"):
            layout = (*layout, "--micro-batch-size", "2")
        losses = train([*flags, *layout], folder, ranks=ranks).losses
        differences[name] = largest_difference(losses, reference)
        assert differences[name] <= LOSS_TOLERANCE, f"{name}: {losses}, one rank: {reference}"
    return differences
