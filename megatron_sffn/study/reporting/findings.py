"""Everything that a report says about a study, computed from its results.

Inputs: `Results`. Outputs: `Findings`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from megatron_sffn.scaling.speedup import BaselineLaw
from megatron_sffn.scaling.surface import Surface
from megatron_sffn.study.learning_rates import Size, Valley
from megatron_sffn.study.reporting.gains import Gain, gains
from megatron_sffn.study.reporting.gaps import gaps
from megatron_sffn.study.reporting.orderings import Ordering, orderings
from megatron_sffn.study.reporting.points import DENSE, Point, points_of
from megatron_sffn.study.reporting.results import Results
from megatron_sffn.study.reporting.scale import sentence, surfaces
from megatron_sffn.utils.human_size import human_count

MIN_SIZES = 2
"""Sizes from which on a scaling is drawn."""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What a study found.

    Args:
        results: the runs.
        points: settings at their best learning rate, by size, series and g.
        valleys: the learning rates of each setting.
        orderings: of sparse points against the dense model, and of neighbours in g.
        law: of the dense model, by which the gains are computed.
        gains: effective speedups.
        surfaces: series -> fitted loss surface; empty with fewer than two sizes.
        gaps: sentences on what was not run.
        remarks: sentences on what was left out, mixed, or could not be computed.
    """

    results: Results
    points: tuple[Point, ...]
    valleys: tuple[Valley, ...]
    orderings: tuple[Ordering, ...]
    law: BaselineLaw
    gains: tuple[Gain, ...]
    surfaces: dict[str, Surface]
    gaps: tuple[str, ...]
    remarks: tuple[str, ...]

    @property
    def sizes(self) -> list[Size]:
        """The sizes of the study, ascending."""
        return sorted({point.size for point in self.points})

    @property
    def holding(self) -> list[Ordering]:
        """Orderings beyond the spread of seeds, the largest difference first."""
        return _largest_first([item for item in self.orderings if item.holds])

    @property
    def open(self) -> list[Ordering]:
        """Orderings that were tested and may be chance."""
        tested = [item for item in self.orderings if item.p_value is not None]
        return _largest_first([item for item in tested if not item.holds])

    @property
    def untested(self) -> list[Ordering]:
        """Orderings of points of which one has a single seed."""
        return _largest_first([item for item in self.orderings if item.p_value is None])

    def lines(self) -> list[tuple[str, list[Point]]]:
        """Sparse points that a figure joins: label and points from fine to coarse."""
        sparse = [point for point in self.points if point.block_size is not None]
        grouped = groupby(sparse, key=lambda point: (point.size, point.series))
        return [(self.label(size, series), list(line)) for (size, series), line in grouped]

    def gain_of(self, point: Point) -> Gain | None:
        """The effective speedup of a point, if it has one."""
        return next((gain for gain in self.gains if gain.point is point), None)

    def label(self, size: Size, series: str) -> str:
        """The label of a line: its series, and its size if the study has several."""
        return f"{series}, {size_label(size)}" if len(self.sizes) > 1 else series


def size_label(size: Size) -> str:
    """A size in a legend."""
    width = f"d {size.hidden_size}" if size.hidden_size else ""
    tokens = f"{human_count(size.tokens).strip()} tokens" if size.tokens else ""
    return " · ".join(filter(None, (width, tokens))) or "one size"


def _largest_first(items: Sequence[Ordering]) -> list[Ordering]:
    return sorted(items, key=lambda item: -item.difference)


def find(results: Results) -> Findings:
    """Compute everything that the report says."""
    points, valleys = points_of(results)
    law, gained = gains(points)
    remarks = [*results.remarks]
    fitted: dict[str, Surface] = {}
    if len({point.size for point in points}) >= MIN_SIZES:
        fitted, more = surfaces(points)
        remarks += [*more, *(sentence(*item, points) for item in fitted.items())]
    without = len(points) - len(gained)
    if without and any(point.router == DENSE for point in points):
        remarks.append(
            f"Settings without an effective speedup: {without}. Their compute or a dense model of "
            "their size is missing, or their loss is beyond the law, which ends at "
            f"{law.asymptote:.3g} nats."
        )
    return Findings(
        results=results,
        points=tuple(points),
        valleys=tuple(valleys),
        orderings=tuple(orderings(points)),
        law=law,
        gains=tuple(gained),
        surfaces=fitted,
        gaps=tuple(gaps(points, valleys)),
        remarks=tuple(remarks),
    )
