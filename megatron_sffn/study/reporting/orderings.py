"""Which of two settings is better, beyond the spread of seeds.

Inputs: points. Outputs: an `Ordering` for each sparse point against the dense model, and for each
two neighbouring block sizes of a series.

Design notes: Welch's t-test, because spreads differ between settings. Its p-values are corrected
for their number by Holm's method, because a study asks many questions at once.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise

import numpy
from scipy import stats

from megatron_sffn.study.reporting.points import DENSE, Point, dense_of

LEVEL = 0.05
"""Corrected p-value below which an ordering holds."""


@dataclass(frozen=True, kw_only=True)
class Ordering:
    """Two points, and whether the difference of their losses is more than chance.

    Args:
        better: the point with the lower mean loss.
        worse: the other one.
        p_value: of Welch's test, corrected; None if one of the points has a single seed.
    """

    better: Point
    worse: Point
    p_value: float | None

    @property
    def difference(self) -> float:
        """Nats per token between their means."""
        return self.worse.loss - self.better.loss

    @property
    def holds(self) -> bool:
        """The difference is beyond the spread of seeds."""
        return self.p_value is not None and self.p_value < LEVEL

    def __str__(self) -> str:
        chance = "" if self.p_value is None else f", p {self.p_value:.2g}"
        below = f"{self.difference:.4f} nats below"
        return f"{self.better.name} is {below} {self.worse.name}{chance}"


def orderings(points: Sequence[Point]) -> list[Ordering]:
    """All orderings, with corrected p-values."""
    compared = [_compare(first, second) for first, second in _pairs(points)]
    tested = [index for index, ordering in enumerate(compared) if ordering.p_value is not None]
    p_values = [compared[index].p_value or 0.0 for index in tested]
    for index, p_value in zip(tested, holm(p_values), strict=True):
        compared[index] = replace(compared[index], p_value=p_value)
    return compared


def _pairs(points: Sequence[Point]) -> Iterator[tuple[Point, Point]]:
    """Each sparse point and the dense model, then neighbours in g. Points are sorted by series."""
    sparse = [point for point in points if point.router != DENSE]
    for point in sparse:
        if dense := dense_of(point, points):
            yield point, dense
    for _, line in groupby(sparse, key=lambda point: (point.size, point.series)):
        yield from pairwise(point for point in line if point.block_size is not None)


def _compare(first: Point, second: Point) -> Ordering:
    better, worse = sorted((first, second), key=lambda point: point.loss)
    p_value = None
    if min(len(first.losses), len(second.losses)) > 1:
        with warnings.catch_warnings(), numpy.errstate(all="ignore"):
            warnings.simplefilter("ignore", RuntimeWarning)  # of seeds with equal losses
            test = stats.ttest_ind(first.losses, second.losses, equal_var=False)
        p_value = 1.0 if numpy.isnan(test.pvalue) else float(test.pvalue)
    return Ordering(better=better, worse=worse, p_value=p_value)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number by Holm's method, in the order of the input."""
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected
