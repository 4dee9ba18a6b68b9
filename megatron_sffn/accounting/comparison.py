"""Costs of several configurations side by side: a table for people, and a plot.

Inputs: a `Row` for each router and block size. Outputs: text, or a PNG file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from megatron_sffn.accounting.table import human
from megatron_sffn.utils.text_table import text_table
from megatron_sffn.utils.tool_output import save_plot

COLUMNS = (
    ("", "router"),
    ("", "g"),
    ("total", "params"),
    ("active", "params"),
    ("forward", "FLOPs"),
    ("training", "FLOPs"),
    ("over", "dense"),
    ("state", "a rank"),
    ("activations", "a rank"),
    ("sent a token", "and layer"),
)
"""The two header lines of each column."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """The costs of one configuration.

    Args:
        parameters_total: all parameters of the model.
        parameters_active: parameters with K instead of B blocks in each sparse layer.
        flops_forward: per token.
        flops_training: per token.
        over_dense: forward FLOPs over those of the dense model, minus 1.
        weights: bytes on the fullest rank.
        gradients: bytes on the fullest rank.
        optimizer: bytes on the fullest rank.
        router_tables: bytes on the fullest rank that routers hold beside their weights.
        activations: bytes on the fullest rank.
        attention_scores: the part of the activations that are the attention's `s²` scores.
        pipeline_stage: pipeline stage of the fullest rank, from 0.
        microbatches_in_flight: on the fullest rank.
        dispatcher: value of `--moe-token-dispatcher-type`; None for a dense model.
        sent_per_token_and_layer: bytes sent by a sparse layer's forward pass; None for a dense
            model.
    """

    parameters_total: int
    parameters_active: int
    flops_forward: int
    flops_training: int
    over_dense: float
    weights: int
    gradients: int
    optimizer: int
    router_tables: int
    activations: int
    attention_scores: int
    pipeline_stage: int
    microbatches_in_flight: float
    dispatcher: str | None
    sent_per_token_and_layer: float | None

    @property
    def state(self) -> int:
        """Bytes of everything but activations."""
        return self.weights + self.gradients + self.optimizer + self.router_tables

    @property
    def memory(self) -> int:
        """Bytes of everything on the fullest rank."""
        return self.state + self.activations


@dataclass(frozen=True, kw_only=True)
class Row:
    """One router and block size with its costs, or the reason why it cannot be trained.

    Args:
        router: name.
        block_size: g; None for a dense model.
        costs: None if there is a reason.
        reason: a sentence.
    """

    router: str
    block_size: int | None
    costs: Costs | None = None
    reason: str | None = None

    @property
    def name(self) -> tuple[str, str]:
        """The first two cells of the row."""
        return self.router, "" if self.block_size is None else str(self.block_size)


def comparison(rows: Sequence[Row]) -> str:
    """The table, then the reasons of rows without costs."""
    lines = [*zip(*COLUMNS, strict=True), *map(_cells, rows)]
    reasons = [f"{' '.join(row.name).strip()}: {row.reason}" for row in rows if row.reason]
    return "\n".join([text_table(lines), *([""] if reasons else []), *reasons])


def _cells(row: Row) -> tuple[str, ...]:
    """The cells of a row of the table."""
    if row.costs is None:
        return (*row.name, *"--------")
    costs, sent = row.costs, row.costs.sent_per_token_and_layer
    counts = (costs.parameters_total, costs.parameters_active)
    flops = (costs.flops_forward, costs.flops_training)
    return (
        *row.name,
        *(human(number).strip() for number in (*counts, *flops)),
        f"{100 * costs.over_dense:+.3g} %",
        f"{human(costs.state)}B",
        f"{human(costs.activations)}B",
        "-" if sent is None else f"{human(sent)}B",
    )


def same_lines(lines: Mapping[str, Mapping[int, float]]) -> list[list[str]]:
    """Group the names of lines whose points agree within 1 %, in the order of the lines."""
    groups: list[list[str]] = []
    for name, points in lines.items():
        for group in groups:
            group_points = lines[group[0]]
            if points.keys() == group_points.keys() and all(
                math.isclose(points[size], group_points[size], rel_tol=0.01, abs_tol=1e-9)
                for size in points
            ):
                group.append(name)
                break
        else:
            groups.append([name])
    return groups


def plot(rows: Sequence[Row], path: Path) -> None:
    """FLOPs over dense and memory of a rank, against the block size.

    Routers whose points agree share a line, since one line would hide the other.

    Args:
        rows: to plot; rows without costs are left out.
        path: path of the PNG file.

    Raises:
        ConfigError: if the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 5.5), layout="constrained")
    costed = [(row, row.costs) for row in rows if row.costs is not None]
    _plot_lines(left, costed, lambda costs: 100 * costs.over_dense, plots_dense=False)
    _plot_lines(right, costed, lambda costs: costs.memory / 1e9, plots_dense=True)
    left.set_yscale("symlog", linthresh=0.01)
    left.set_ylabel("forward FLOPs over dense, %")
    right.set_ylabel("memory of the fullest rank, GB")
    right.set_ylim(0, 1.1 * max((costs.memory / 1e9 for _, costs in costed), default=1))
    ticks = sorted({row.block_size for row, _ in costed if row.block_size})
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(size) for size in ticks])
        axes.set_xlabel("block size g")
        axes.grid(alpha=0.3)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False)
    save_plot(figure, path)


def _plot_lines(
    axes: Any,
    costed: Sequence[tuple[Row, Costs]],
    number: Callable[[Costs], float],
    *,
    plots_dense: bool,
) -> None:
    """One line per router, or per group of routers whose points agree.

    Args:
        axes: axes of matplotlib.
        costed: rows with their costs.
        number: function from the costs to the number to plot.
        plots_dense: True to plot the dense model, which has no block size, as a horizontal line.
    """
    lines: dict[str, dict[int, float]] = {row.router: {} for row, _ in costed}
    for row, costs in costed:
        lines[row.router][row.block_size or 0] = number(costs)
    styles = {
        router: {"marker": marker, "color": f"C{index % 10}", "alpha": 0.8, "fillstyle": "none"}
        for index, (router, marker) in enumerate(zip(lines, cycle("osD^vPX*"), strict=False))
    }
    for names in same_lines(lines):
        points, label = sorted(lines[names[0]].items()), ", ".join(names)
        if points[0][0]:
            axes.plot(*zip(*points, strict=True), label=label, **styles[names[0]])
        elif plots_dense:
            axes.axhline(points[0][1], color="gray", linestyle="--", label=label)
