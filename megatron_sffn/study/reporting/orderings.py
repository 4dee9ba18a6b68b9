"""Which of two settings is better, beyond the spread of seeds.

Inputs: points. Outputs: an `Ordering` for each pair that answers one of three questions: is a
sparse point better than the dense model; is a block size better than the next one of its series; is
a series better than another one at the same block size?

Design notes: Welch's t-test with the variances of `spread.py`. The p-values of each question are
corrected for their number by Holm's method.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, groupby, pairwise

from megatron_sffn.study.learning_rates import Size
from megatron_sffn.study.reporting.points import DENSE, Point, dense_of
from megatron_sffn.study.reporting.spread import Spread, p_value, spreads

LEVEL = 0.05
"""Corrected p-value below which an ordering holds."""


@dataclass(frozen=True, kw_only=True)
class Ordering:
    """Two points, and whether the difference of their losses is more than chance.

    Args:
        better: the point with the lower mean loss.
        worse: the other one.
        p_value: corrected for the number of tests; None if one of the points has a single seed.
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
    """All orderings, with p-values that are corrected within each question."""
    sparse = [point for point in points if point.router != DENSE]
    names = [(point.size, point.name) for point in points]
    spread_of = dict(zip(names, spreads([point.losses for point in points]), strict=True))
    questions = (_with_dense(sparse, points), _neighbours(sparse), _series_at_equal_g(sparse))
    return [
        ordering
        for pairs in questions
        for ordering in _corrected([_compare(*pair, spread_of) for pair in pairs])
    ]


def _corrected(compared: list[Ordering]) -> list[Ordering]:
    """The orderings of one question with corrected p-values."""
    tested = [index for index, ordering in enumerate(compared) if ordering.p_value is not None]
    p_values = [compared[index].p_value or 0.0 for index in tested]
    for index, corrected in zip(tested, holm(p_values), strict=True):
        compared[index] = replace(compared[index], p_value=corrected)
    return compared


Pairs = Iterator[tuple[Point, Point]]


def _with_dense(sparse: Sequence[Point], points: Sequence[Point]) -> Pairs:
    """Each sparse point with the dense model of its size."""
    for point in sparse:
        if dense := dense_of(point, points):
            yield point, dense


def _neighbours(sparse: Sequence[Point]) -> Pairs:
    """Neighbouring block sizes of a series. Points are sorted by series."""
    for _, line in groupby(sparse, key=lambda point: (point.size, point.series)):
        yield from pairwise(point for point in line if point.block_size is not None)


def _series_at_equal_g(sparse: Sequence[Point]) -> Pairs:
    """Every two series of a size at each block size that both have."""
    for first, second in combinations(sparse, 2):
        same = first.size == second.size and first.block_size == second.block_size
        if same and first.block_size is not None:
            yield first, second


def _compare(
    first: Point, second: Point, spread_of: Mapping[tuple[Size, str], Spread | None]
) -> Ordering:
    better, worse = sorted((first, second), key=lambda point: point.loss)
    low, high = (spread_of[point.size, point.name] for point in (better, worse))
    tested = None if low is None or high is None else p_value(low, high)
    return Ordering(better=better, worse=worse, p_value=tested)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number by Holm's method, in the order of the input."""
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected
