"""The best learning rate of each setting, by a parabola through a ladder of learning rates.

Inputs: rows of results. Outputs: a `Valley` for each setting.

Design notes: granularity moves the best learning rate (arXiv 2508.09752), so settings are compared
at their own best rate. The parabola goes through the best rate and its neighbours, because valleys
are steep on the side where training diverges. The comparison uses the best rate that was trained;
the parabola says how much a finer ladder could gain.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy

MIN_RATES = 3
"""Rates that fix a parabola."""
LADDER, FITTED, TRANSFERRED = "ladder", "fitted", "transferred"
"""Sources of a learning rate: a run that serves to find the best one; the best one of the ladder;
the best one of another study, scaled. Any other rate is "given"."""


@dataclass(frozen=True, order=True, kw_only=True)
class Size:
    """What settings must have in common to be compared.

    Args:
        hidden_size: d; 0 if it is not known.
        num_layers: number of layers; 0 if it is not known.
        tokens: number of training tokens; 0 if it is not known.
    """

    hidden_size: int
    num_layers: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Valley:
    """The losses of a setting over its learning rates.

    Args:
        point: name of the setting.
        size: of the model and its training.
        router: "dense" for the dense model.
        block_size: g in cells; None for the dense model.
        rates: learning rates, ascending.
        losses: mean over seeds for each rate, in nats per token.
        best: the rate with the lowest of these losses.
        optimum: rate and loss at the bottom of the parabola; None without a ladder or a bottom.
        at_edge: the best rate is the first or the last one, so a better one may lie beyond.
        source: where the rates are from: "given", "ladder", "fitted" or "transferred".
    """

    point: str
    size: Size
    router: str
    block_size: int | None
    rates: tuple[float, ...]
    losses: tuple[float, ...]
    best: float
    optimum: tuple[float, float] | None
    at_edge: bool
    source: str


Ladder = dict[float, list[dict[str, Any]]]
"""Learning rate -> the rows of its seeds."""


def size_of(row: Mapping[str, Any]) -> Size:
    """The size of a run."""
    return Size(
        hidden_size=int(row["hidden_size"] or 0),
        num_layers=int(row["num_layers"] or 0),
        tokens=int(row["tokens"] or 0),
    )


def ladders(rows: Iterable[dict[str, Any]]) -> dict[tuple[Size, str], Ladder]:
    """Size and name of each setting -> its ladder, with ascending rates."""
    found: dict[tuple[Size, str], Ladder] = {}
    for row in rows:
        ladder = found.setdefault((size_of(row), str(row["point"])), {})
        ladder.setdefault(float(row["lr"]) if row["lr"] is not None else 0.0, []).append(row)
    return {key: dict(sorted(ladder.items())) for key, ladder in found.items()}


def valley(size: Size, point: str, ladder: Ladder) -> Valley:
    """The losses of a setting over its learning rates."""
    rates = tuple(ladder)
    losses = tuple(statistics.fmean(row["loss"] for row in rows) for rows in ladder.values())
    place = min(range(len(rates)), key=losses.__getitem__)
    at_edge = len(rates) >= MIN_RATES and place in (0, len(rates) - 1)
    first = next(iter(ladder.values()))[0]
    return Valley(
        point=point,
        size=size,
        router=str(first["router"]),
        block_size=int(first["block_size"]) if first["block_size"] else None,
        rates=rates,
        losses=losses,
        best=rates[place],
        optimum=bottom(rates, losses),
        at_edge=at_edge,
        source=str(first.get("rate_source") or "given"),
    )


def bottom(rates: tuple[float, ...], losses: tuple[float, ...]) -> tuple[float, float] | None:
    """Rate and loss at the bottom of a parabola in the logarithm of the rate.

    Args:
        rates: ascending learning rates.
        losses: of each rate.

    Returns:
        None if the best rate is at an edge, or the parabola through it has no bottom.
    """
    place = min(range(len(rates)), key=losses.__getitem__)
    if place in (0, len(rates) - 1):
        return None
    near = slice(place - 1, place + 2)
    middle = math.log(rates[place])
    curve = numpy.polyfit([math.log(rate) - middle for rate in rates[near]], losses[near], 2)
    if curve[0] <= 0:
        return None
    lowest = -curve[1] / (2 * curve[0])
    return math.exp(middle + lowest), float(numpy.polyval(curve, lowest))
