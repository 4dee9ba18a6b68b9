"""How losses change with size: a fitted surface for each router, and published laws.

Inputs: points of at least two sizes. Outputs: surfaces, and losses of published laws.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from itertools import groupby

from megatron_sffn.scaling import laws
from megatron_sffn.scaling.surface import Observation, Surface, fit_surface
from megatron_sffn.study.reporting.points import DENSE, Point
from megatron_sffn.utils.errors import ConfigError

MISFIT = 3
"""Residual of a surface over the spread of seeds from which on it is said not to fit."""
NEEDED = ("parameters_active", "training_flops")


def observation(point: Point) -> Observation | None:
    """A sparse point as an observation of the surface; None if a number is not known."""
    if point.block_size is None or not all(point.means.get(name) for name in NEEDED):
        return None
    if not (point.size.hidden_size and point.size.tokens):
        return None
    return Observation(
        loss=point.loss,
        parameters=point.means["parameters_active"],
        tokens=point.size.tokens,
        compute=point.means["training_flops"],
        granularity=laws.granularity(point.size.hidden_size, point.block_size),
    )


def surfaces(points: Sequence[Point]) -> tuple[dict[str, Surface], list[str]]:
    """Series -> its surface; and a sentence for each series that has too few points."""
    fitted, remarks = {}, []
    lines = sorted((p for p in points if p.router != DENSE), key=lambda point: point.series)
    for series, line in groupby(lines, key=lambda point: point.series):
        observations = [model for point in line if (model := observation(point))]
        try:
            fitted[series] = fit_surface(observations)
        except ConfigError as error:
            remarks.append(f"No surface for {series}: {error}.")
    return fitted, remarks


def sentence(series: str, surface: Surface, points: Sequence[Point]) -> str:
    """What a surface says, and whether it describes the points.

    Args:
        series: of the surface.
        surface: the fit.
        points: of all series.
    """
    low, high = surface.exponent_interval()
    size = "active parameters" if surface.form.size == "parameters" else "compute"
    text = (
        f"{series}: loss falls with the {size} by an exponent of {surface.values[0]:.3f} "
        f"({low:.3f} to {high:.3f}); residual {surface.residual:.4f} nats"
    )
    spreads = [point.spread for point in points if point.series == series and point.spread]
    if spreads and surface.residual > MISFIT * statistics.fmean(spreads):
        text += ", far beyond the spread of seeds, so that this form does not describe the losses"
    if not surface.form.has_asymptote:
        text += ", with an asymptote of 0, because fewer than three sizes cannot fix one"
    best, interval = surface.best_granularity(), surface.best_granularity_interval()
    if best is None:
        return f"{text}; no best block size within the surface."
    if interval is None:
        return f"{text}; the best block size is not certain."
    low, high = 4 / interval[1], 4 / interval[0]
    return f"{text}; best block size {4 / best:.3g} d ({low:.3g} d to {high:.3g} d)."


def _krajewski(point: Point) -> float:
    if point.block_size is None:
        return laws.KRAJEWSKI_DENSE.loss(
            parameters=point.means["parameters_total"], tokens=point.size.tokens
        )
    return laws.KRAJEWSKI_SPARSE.loss(
        parameters=point.means["parameters_total"],
        tokens=point.size.tokens,
        granularity=laws.granularity(point.size.hidden_size, point.block_size),
    )


def _ludziejewski(point: Point) -> float:
    return laws.ludziejewski_loss(
        expansion=point.means.get("expansion", 1.0),
        parameters_active=point.means["parameters_active"],
        tokens=point.size.tokens,
    )


def _marin(point: Point) -> float:
    return laws.marin_loss(compute=point.means["training_flops"])


PUBLISHED: dict[str, Callable[[Point], float]] = {
    "Krajewski 2024": _krajewski,
    "Ludziejewski 2025": _ludziejewski,
    "marin grug-moe": _marin,
}
"""Law -> its loss in nats per token at the place of a point."""


def published_losses(line: Sequence[Point]) -> dict[str, list[float]]:
    """Law -> losses at the places of points, shifted so that the first is that of the first point.

    A law whose numbers the points do not have is left out.
    """
    found = {}
    for name, law in PUBLISHED.items():
        try:
            losses = [law(point) for point in line]
        except (KeyError, ZeroDivisionError, OverflowError):
            continue
        found[name] = [line[0].loss + loss - losses[0] for loss in losses]
    return found
