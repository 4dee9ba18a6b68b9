"""Settings at their best learning rate: mean and spread over seeds.

Inputs: results of a study. Outputs: a `Point` for each setting.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_sffn.study.learning_rates import LADDER, Size, Valley, ladders, size_of, valley
from megatron_sffn.study.reporting.results import Results

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
    """All settings by size, router, and g from fine to coarse; and their learning rates.

    Runs of a ladder, which may be shorter, only give the rate of a setting: they are compared with
    each other if the study has no other runs, and else with nothing.
    """
    varied = _varied(results)
    rungs = [row for row in results.rows if row["rate_source"] == LADDER]
    compared = [row for row in results.rows if row["rate_source"] != LADDER] or rungs
    tuned = {row["point"] for row in rungs}
    points, valleys = [], [valley(*key, ladder) for key, ladder in ladders(rungs).items()]
    for (size, name), ladder in ladders(compared).items():
        rates = valley(size, name, ladder)
        valleys += [] if name in tuned else [rates]
        points.append(_point(size, name, rates.best, ladder[rates.best], varied))
    valleys.sort(key=lambda item: (item.size, item.router, item.block_size or 0, item.point))
    return sorted(points, key=_order), valleys


def _order(point: Point) -> tuple[Any, ...]:
    return point.size, point.router != DENSE, point.series, point.block_size or 0, point.name


def _setting(row: Mapping[str, Any], name: str) -> str:
    """A setting as a label of a series shows it; active cells as a multiple of d."""
    if name == "active_cells" and row[name] and row["hidden_size"]:
        return f"k {row[name] / row['hidden_size']:g} d"
    return f"{name} {row.get(name)}"


def _varied(results: Results) -> list[str]:
    """The columns by which a study makes several series of one router and size."""
    settings_of: dict[tuple[str, Size], set[str]] = {}
    for row in results.rows:
        if row["router"] != DENSE:
            for name in ("expansion", "active_cells", *results.flags):
                settings_of.setdefault((name, size_of(row)), set()).add(_setting(row, name))
    return list(dict.fromkeys(name for (name, _), found in settings_of.items() if len(found) > 1))


def _point(
    size: Size, name: str, lr: float, rows: Sequence[dict[str, Any]], varied: Sequence[str]
) -> Point:
    first = rows[0]
    router = str(first["router"])
    extra = [] if router == DENSE else [_setting(first, name) for name in varied]
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
