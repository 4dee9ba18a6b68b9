"""Settings at their best learning rate: mean and spread over seeds.

Inputs: results of a study. Outputs: a `Point` for each setting.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_sffn.study.learning_rates import Size, Valley, ladders, valley
from megatron_sffn.study.results import Results

DENSE = "dense"
"""Router of the dense model."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """A setting at its best learning rate.

    Args:
        name: of the setting.
        router: "dense" for the dense model.
        block_size: g in cells; None for the dense model.
        size: of the model and its training.
        series: what a line of a figure has in common: the router, and the expansion, active cells
            and flags by which the study varies it.
        lr: learning rate.
        losses: in nats per token, one for each seed.
        seeds: of the losses.
        runs: names of the runs.
        means: column -> mean over the seeds that have it.
    """

    name: str
    router: str
    block_size: int | None
    size: Size
    series: str
    lr: float
    losses: tuple[float, ...]
    seeds: tuple[int, ...]
    runs: tuple[str, ...]
    means: dict[str, float]

    @property
    def loss(self) -> float:
        """The mean loss over seeds."""
        return statistics.fmean(self.losses)

    @property
    def spread(self) -> float | None:
        """The standard deviation of the loss over seeds; None with a single seed."""
        return statistics.stdev(self.losses) if len(self.losses) > 1 else None


def points_of(results: Results) -> tuple[list[Point], list[Valley]]:
    """All settings by size, router, and g from fine to coarse; and their learning rates."""
    varied = _varied(results)
    points, valleys = [], []
    for (size, name), ladder in ladders(results.rows).items():
        valleys.append(valley(size, name, ladder))
        points.append(_point(size, name, valleys[-1].best, ladder[valleys[-1].best], varied))
    valleys.sort(key=lambda item: (item.size, item.router, item.block_size or 0, item.point))
    return sorted(points, key=_order), valleys


def _order(point: Point) -> tuple[Any, ...]:
    return point.size, point.router != DENSE, point.series, point.block_size or 0, point.name


def _varied(results: Results) -> list[str]:
    """The columns by which a study makes several series of one router."""
    names = ["expansion", *results.flags]
    sparse = [row for row in results.rows if row["router"] != DENSE]
    return [name for name in names if len({str(row.get(name)) for row in sparse}) > 1]


def _point(
    size: Size, name: str, lr: float, rows: Sequence[dict[str, Any]], varied: Sequence[str]
) -> Point:
    first = rows[0]
    router = str(first["router"])
    extra = [] if router == DENSE else [f"{key} {first.get(key)}" for key in varied]
    columns = dict.fromkeys(column for row in rows for column in row)
    values = {
        column: [float(row[column]) for row in rows if _is_number(row.get(column))]
        for column in columns
    }
    return Point(
        name=name,
        router=router,
        block_size=int(first["block_size"]) if first["block_size"] and router != DENSE else None,
        size=size,
        series=", ".join([router, *extra]),
        lr=lr,
        losses=tuple(row["loss"] for row in rows),
        seeds=tuple(int(row["seed"] or 0) for row in rows),
        runs=tuple(str(row["run"]) for row in rows),
        means={column: statistics.fmean(found) for column, found in values.items() if found},
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def dense_of(point: Point, points: Sequence[Point]) -> Point | None:
    """The dense model of a point's size, the one of most similar compute; None without one."""
    dense = [other for other in points if other.router == DENSE and other.size == point.size]
    compute = point.means.get("training_flops", 0.0)
    return min(
        dense, key=lambda other: abs(other.means.get("training_flops", 0.0) - compute), default=None
    )
