"""The effective speedup of each setting over the dense model of its size.

Inputs: points. Outputs: the law of the baseline, and a `Gain` for each point that has one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_sffn.scaling.speedup import (
    BaselineLaw,
    Speedup,
    Trained,
    baseline_law,
    effective_speedup,
)
from megatron_sffn.study.reporting.points import DENSE, Point, dense_of


@dataclass(frozen=True, kw_only=True)
class Gain:
    """The effective speedup of a point.

    Args:
        point: whose speedup it is.
        mean: at its mean loss.
        low: at its mean loss plus a standard deviation over seeds; the mean with one seed.
        high: at its mean loss less a standard deviation; the mean if that loss is out of reach.
    """

    point: Point
    mean: Speedup
    low: Speedup
    high: Speedup


def trained(point: Point, shift: float = 0.0) -> Trained | None:
    """A point as a trained model; None if its compute is not known.

    Args:
        point: the point.
        shift: nats per token that are added to its loss.
    """
    compute = point.means.get("training_flops")
    if not compute:
        return None
    seconds = point.means.get("seconds")
    return Trained(loss=point.loss + shift, compute=compute, seconds=seconds)


def gains(points: Sequence[Point]) -> tuple[BaselineLaw, list[Gain]]:
    """The law of the dense models, and the gains over them."""
    dense = [model for p in points if p.router == DENSE if (model := trained(p)) is not None]
    law = baseline_law(dense)
    found = (_gain(point, points, law) for point in points)
    return law, [gain for gain in found if gain is not None]


def _gain(point: Point, points: Sequence[Point], law: BaselineLaw) -> Gain | None:
    own = dense_of(point, points)
    baseline = trained(own) if own else None
    if baseline is None:
        return None
    spread = point.spread or 0.0
    models = [trained(point, shift) for shift in (0.0, spread, -spread)]
    mean, low, high = (effective_speedup(m, baseline, law) if m else None for m in models)
    if mean is None:
        return None
    return Gain(point=point, mean=mean, low=low or mean, high=high or mean)
