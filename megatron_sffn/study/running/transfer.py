"""Learning rates of one training derived from those of another.

Inputs: the results of a study that has tuned its rates, and the flags of a run. Outputs: a rate.

Design notes: router and block size move the best rate most (arXiv 2508.09752), so a run takes the
rate of the tuned model with its router whose block size, expansion and width are nearest. Width,
tokens and batch follow the rule of marin's grug-moe: tokens^-0.2813 d^-0.3678 sqrt(batch).
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow.parquet

from megatron_sffn.scaling.laws import marin_learning_rate
from megatron_sffn.study.learning_rates import LADDER
from megatron_sffn.utils.errors import ConfigError

RESULTS = "results.parquet"
SIZES = ("block_size", "expansion", "hidden_size")
"""Columns by which the nearest model is chosen, as a sum of absolute log2 ratios."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """What moves the best learning rate of a model.

    Args:
        hidden_size: d.
        tokens: of the whole training.
        batch_tokens: of one step.
    """

    hidden_size: int
    tokens: int
    batch_tokens: int

    @classmethod
    def of_args(cls, args: Namespace) -> Training:
        """The training of a run, by Megatron's namespace."""
        batch = args.global_batch_size * args.seq_length
        return cls(
            hidden_size=args.hidden_size, tokens=args.train_iters * batch, batch_tokens=batch
        )


def scaled_rate(rate: float, tuned: Training, target: Training) -> float:
    """The best learning rate of a training by that of another one."""

    def by_rule(training: Training) -> float:
        return marin_learning_rate(
            tokens=training.tokens,
            hidden_size=training.hidden_size,
            batch=training.batch_tokens,
        )

    return rate * by_rule(target) / by_rule(tuned)


def transferred_rate(folder: Path, args: Namespace) -> float:
    """The learning rate of a run by the results of a study.

    Args:
        folder: of the study.
        args: Megatron's namespace of the run.

    Raises:
        ConfigError: if the study has no results, or none of the run's router.
    """
    rows = _rows(folder)
    same = [row for row in rows if row["router"] == args.sffn_router]
    if not same:
        routers = ", ".join(sorted({str(row["router"]) for row in rows}))
        raise ConfigError(
            f"transfer {folder} has no learning rate of the router {args.sffn_router}; it has "
            f"{routers}; tune that router there, or give lr"
        )
    wanted = {
        "block_size": args.sffn_block_size,
        "expansion": args.sffn_expansion,
        "hidden_size": args.hidden_size,
    }
    best = min(same, key=lambda row: (_distance(row, wanted), row["loss"]))
    tuned = Training(
        hidden_size=best["hidden_size"],
        tokens=best["tokens"],
        batch_tokens=best["tokens"] // best["iterations"],
    )
    return scaled_rate(best["lr"], tuned, Training.of_args(args))


def _distance(row: Mapping[str, Any], wanted: Mapping[str, int | None]) -> float:
    """How far a tuned model is from a run; a size that one of them lacks does not count."""
    pairs = [(row[name], wanted[name]) for name in SIZES]
    return sum(abs(math.log2(tuned / size)) for tuned, size in pairs if tuned and size)


def _rows(folder: Path) -> list[dict[str, Any]]:
    """A row for each point and rate that was trained in full, with its mean loss over seeds."""
    path = folder / RESULTS
    if not path.is_file():
        raise ConfigError(
            f"transfer {folder} has no {RESULTS}, which gives the learning rates; run that study "
            "first, or give lr"
        )
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in pyarrow.parquet.read_table(path).to_pylist():
        if row["rate_source"] != LADDER and row["validation_loss"] is not None:
            groups.setdefault((row["point"], row["lr"]), []).append(row)
    return [
        {**rows[0], "loss": fmean(row["validation_loss"] for row in rows)}
        for rows in groups.values()
    ]
