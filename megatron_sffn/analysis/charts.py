"""Plots a run's routing: one PNG for each question, with a panel for each layer.

Inputs: curves, loads, matrices, tables. Outputs: files.

Design notes:
- Blocks have no natural order: they are sorted by load, or so that similar blocks are neighbours.
- If there are more than `ROWS` blocks, groups of neighbours are averaged into `ROWS` rows, so that
  65,536 blocks can be plotted, too.
- The colours of ratios are logarithmic, and white at 1: an even load, or chance.
- A metric that is 0 in every layer at every step has no panel; the title names it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.lines
import numpy
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.transforms import Bbox

from megatron_sffn.analysis.lines import Curve, Loads
from megatron_sffn.analysis.measures import Floats
from megatron_sffn.analysis.tokens import Served, shown

ROWS = 128
"""Blocks, or groups of blocks, that a heat map shows."""
COLUMNS = 4
"""Panels next to each other."""
LEGEND = 8
"""Layers that a legend names; more layers get a colour scale."""

STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "figure.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "savefig.dpi": 110,
}

TITLES = {
    "load_entropy": ("load entropy", "1 is even, 0 is one block"),
    "dead_share": ("dead blocks", "share of blocks"),
    "load_p50": ("median load", "× even load"),
    "load_p95": ("95th percentile of the load", "× even load"),
    "load_max": ("largest load", "× even load"),
    "gate_mean": ("mean gate of chosen blocks", "gate"),
    "gate_std": ("deviation of chosen gates", "gate"),
    "negative_share": ("chosen scores below zero", "share of scores"),
    "empty_share": ("places left empty", "share of places"),
}
"""Metric -> title and unit."""


def numbers(curves: Mapping[str, Mapping[int, Curve]], path: Path) -> None:
    """Plot every metric of training over the steps, with a line for each layer."""
    layers = sorted({layer for curve_of_layer in curves.values() for layer in curve_of_layer})
    colours = dict(zip(layers, _colours(len(layers)), strict=True))
    plotted, zeros = without_zeros(curves)
    heading = "Routing during training"
    if zeros:
        absent = ", ".join(_title(name)[0] for name in zeros)
        heading += f"\n0 in every layer at every step: {absent}"
    with _figure(path, heading, len(plotted), 3.0) as (figure, panels):
        for axes, (name, curve_of_layer) in zip(panels, plotted.items(), strict=True):
            title, unit = _title(name)
            for layer, curve in curve_of_layer.items():
                mark = "." if len(curve.steps) == 1 else ""
                axes.plot(curve.steps, curve.values, mark + "-", color=colours[layer], lw=1)
            axes.set_title(title)
            axes.set_xlabel("step")
            axes.set_ylabel(unit)
            if unit.startswith("share"):
                most = max(1.05 * axes.get_ylim()[1], 0.1)
                axes.set_ylim(-0.03 * most, most)  # a line at 0 is not covered by the axis
        handles = [matplotlib.lines.Line2D([], [], color=colours[layer]) for layer in layers]
        if len(layers) > LEGEND:
            handles, layers = [handles[0], handles[-1]], [layers[0], layers[-1]]
        names = [f"layer {layer}" for layer in layers]
        figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)


def without_zeros(
    curves: Mapping[str, Mapping[int, Curve]],
) -> tuple[dict[str, Mapping[int, Curve]], list[str]]:
    """The metrics that are not always 0, and the names of the others; all metrics if all are 0."""
    zeros = [
        name
        for name, curve_of_layer in curves.items()
        if not any(any(curve.values) for curve in curve_of_layer.values())
    ]
    if len(zeros) == len(curves):
        return dict(curves), []
    return {name: curves[name] for name in curves if name not in zeros}, zeros


def load_over_time(loads: Mapping[int, Loads], path: Path) -> None:
    """Plot the load of the blocks at each evaluation, sorted by the load at the last one."""
    with _figure(path, "Load of the blocks over time", len(loads), 2.8) as (figure, panels):
        for axes, (layer, load) in zip(panels, loads.items(), strict=True):
            order = numpy.argsort(-load.relative[-1], kind="stable")
            rows = _grouped(load.relative[:, order].T)
            image = _ratios(axes, rows, least=1 / 16, most=16)
            _label_steps(axes, load.steps)
            axes.set_title(f"layer {layer}")
            axes.set_xlabel("step of the evaluation")
            axes.set_ylabel(_of_blocks(len(order), len(rows)))
            axes.set_yticks([])
        _scale(figure, image, panels, "load, × even load (≤ 1/16: hardly used or dead)")


def load_now(loads: Mapping[int, Loads], path: Path) -> None:
    """Plot the load of the blocks at the last evaluation, in descending order."""
    step = max(load.steps[-1] for load in loads.values())
    with _figure(path, f"Load of the blocks at step {step}", len(loads), 2.4) as (_, panels):
        for axes, (layer, load) in zip(panels, loads.items(), strict=True):
            last = numpy.sort(load.relative[-1])[::-1]
            axes.stairs(last, fill=True, color="#d9622b")
            axes.axhline(1, color="black", lw=0.8, ls=":")
            axes.text(len(last), 1, "even ", ha="right", va="bottom", fontsize=8)
            dead = int((last == 0).sum())
            axes.set_title(f"layer {layer}: {dead:,} of {len(last):,} dead, largest {last[0]:.1f}×")
            axes.set_xlabel("blocks, by load")
            axes.set_ylabel("load, × even load")
            axes.set_xlim(0, len(last))
            axes.set_ylim(0, None)


def coactivation(matrices: Mapping[int, Floats], title: str, path: Path) -> None:
    """Plot how often two blocks have the same token, relative to chance."""
    with _figure(path, title, len(matrices), 3.2) as (figure, panels):
        for axes, (layer, matrix) in zip(panels, matrices.items(), strict=True):
            image = _ratios(axes, matrix, least=1 / 8, most=8)
            _square(axes, layer, len(matrix))
        _scale(figure, image, panels, "tokens with both blocks, × chance")


def overlap(matrices: Mapping[int, Floats], title: str, path: Path) -> None:
    """Plot how similar the token ids of two blocks are."""
    most = max(numpy.nanmax(m) if m.size > 1 else 0.0 for m in matrices.values())
    with _figure(path, title, len(matrices), 3.2) as (figure, panels):
        for axes, (layer, matrix) in zip(panels, matrices.items(), strict=True):
            image = axes.imshow(matrix, cmap="viridis", vmin=0, vmax=most or 1.0)
            _square(axes, layer, len(matrix))
        _scale(figure, image, panels, "overlap of token ids: 1 same, 0 none in common")


def drift(
    to_last: Mapping[int, Curve],
    to_next: Mapping[int, Curve],
    chance: Mapping[int, float],
    path: Path,
) -> None:
    """Plot the share of a token's blocks that stays until the next checkpoint, and the last one.

    Two checkpoints give one number per layer, which is plotted as a bar.
    """
    layers = sorted(to_next)
    if len(to_next[layers[0]].steps) == 1:
        _drift_of_two(to_last, to_next, chance, path)
        return
    colours = dict(zip(layers, _colours(len(layers)), strict=True))
    with _figure(path, "Drift between checkpoints", 2, 3.2) as (figure, panels):
        titles = ("kept since the checkpoint before", "shared with the last checkpoint")
        for axes, title, curves in zip(panels, titles, (to_next, to_last), strict=True):
            for layer, curve in curves.items():
                axes.plot(curve.steps, curve.values, "o-", ms=3, lw=1, color=colours[layer])
                axes.axhline(chance[layer], color=colours[layer], lw=0.8, ls=":")
            axes.set_title(title)
            axes.set_xlabel("step of the checkpoint")
            axes.set_ylabel("share of a token's blocks")
            axes.set_ylim(0, 1.02)
        shown_layers = layers if len(layers) <= LEGEND else [layers[0], layers[-1]]
        handles = [matplotlib.lines.Line2D([], [], color=colours[layer]) for layer in shown_layers]
        handles.append(matplotlib.lines.Line2D([], [], color="black", ls=":", lw=0.8))
        names = [*(f"layer {layer}" for layer in shown_layers), "by chance"]
        figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)


def _drift_of_two(
    to_last: Mapping[int, Curve],
    to_next: Mapping[int, Curve],
    chance: Mapping[int, float],
    path: Path,
) -> None:
    """Plot a bar for each layer: the share of blocks that the second checkpoint kept."""
    layers = sorted(to_next)
    positions = range(len(layers))
    (first_step,), (second_step,) = to_last[layers[0]].steps, to_next[layers[0]].steps
    title = f"Drift from step {first_step} to step {second_step}"
    width = max(5.0, 1.5 + 0.4 * len(layers))
    with _figure(path, title, 1, 3.2, width=width) as (figure, (axes,)):
        bars = axes.bar(positions, [to_next[layer].values[0] for layer in layers], width=0.6)
        ends = [(position - 0.4, position + 0.4) for position in positions]
        by_chance = axes.hlines(
            [chance[layer] for layer in layers], *zip(*ends, strict=True), color="black", lw=1.2
        )
        for position, layer in zip(positions, layers, strict=True):
            share = to_next[layer].values[0]
            top = max(share, chance[layer]) + 0.01
            axes.text(position, top, f"{share:.0%}", ha="center", va="bottom", fontsize=8)
        ticks = positions[:: max(1, -(-len(layers) // 16))]
        axes.set_xticks(ticks, labels=[str(layers[position]) for position in ticks])
        axes.set_xlabel("layer")
        axes.set_ylabel("share of a token's blocks")
        axes.set_ylim(0, 1.05)
        handles, names = [bars, by_chance], ["kept", "by chance"]
        figure.legend(handles, names, loc="outside lower center", ncols=2, frameon=False)


def token_table(rows: Sequence[Served], title: str, path: Path) -> None:
    """Plot the token ids that characterise each block, with a row for each block."""
    blocks: dict[int, list[Served]] = {}
    for row in rows:
        blocks.setdefault(row.block, []).append(row)
    width = max(map(len, blocks.values()))
    cells = [
        [f"{block}", f"{ids[0].load:.1f}×"]
        + [f"{_clip(row.text)}\n{row.share:.0%}, {row.ratio:.1f}×" for row in ids]
        + [""] * (width - len(ids))
        for block, ids in blocks.items()
    ]
    with matplotlib.rc_context(STYLE):
        size = (1.6 + 1.15 * width, 0.9 + 0.5 * (len(cells) + 1))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        axes.set_axis_off()
        axes.set_title(
            f"{title}\nbelow a token: its share of the block's tokens, × its share of all"
        )
        head = ["block", "load", *(f"{rank}." for rank in range(1, width + 1))]
        table = axes.table(cellText=cells, colLabels=head, cellLoc="center", bbox=Bbox.unit())
        table.auto_set_font_size(False)
        table.set_fontsize(8)
        for cell in table.get_celld().values():
            cell.set_linewidth(0.3)
            cell.get_text().set_parse_math(False)
            cell.get_text().set_linespacing(1.6)  # an underscore stays clear of the line below it
        figure.savefig(path)


@contextmanager
def _figure(
    path: Path, title: str, count: int, height: float, *, width: float = 5.0
) -> Iterator[tuple[Figure, list[Any]]]:
    """A figure with `count` panels, which is written to `path` when the block ends.

    Args:
        path: the file to write.
        title: title of the figure.
        count: number of panels.
        height: height of a panel, in inches.
        width: minimum width of the figure, in inches.
    """
    with matplotlib.rc_context(STYLE):
        columns = min(count, COLUMNS)
        lines = -(-count // columns)
        size = (max(3.4 * columns, width), height * lines + 0.7)
        figure = Figure(figsize=size, layout="constrained")
        figure.suptitle(title)
        panels = list(figure.subplots(lines, columns, squeeze=False).flatten())
        for axes in panels[count:]:
            axes.set_axis_off()
        yield figure, panels[:count]
        figure.savefig(path)


def _title(name: str) -> tuple[str, str]:
    """Title and unit of a metric of training."""
    return TITLES.get(name, (name.replace("_", " "), "loss, unweighted"))


def _ratios(axes: Any, matrix: Floats, *, least: float, most: float) -> Any:
    """Plot ratios: red above 1, blue below."""
    logs = numpy.log2(numpy.clip(matrix, least, most))
    return axes.imshow(
        logs,
        cmap="RdBu_r",
        vmin=math.log2(least),
        vmax=math.log2(most),
        aspect="auto",
        interpolation="nearest",
    )


def _scale(figure: Figure, image: Any, panels: Sequence[Any], label: str) -> None:
    """A colour scale beside all panels, with powers of two if it is one of ratios."""
    bar = figure.colorbar(image, ax=list(panels), label=label, shrink=0.9)
    if image.get_cmap().name == "RdBu_r":
        low, high = (int(end) for end in image.get_clim())
        ticks = range(low, high + 1)
        bar.set_ticks(list(ticks), labels=[f"{2**t}" if t >= 0 else f"1/{2**-t}" for t in ticks])


def _grouped(rows: Floats) -> Floats:
    """At most `ROWS` rows; more are averaged in groups of neighbours."""
    if len(rows) <= ROWS:
        return rows
    return numpy.stack([group.mean(axis=0) for group in numpy.array_split(rows, ROWS)])


def _of_blocks(blocks: int, rows: int) -> str:
    """The label for the rows of a heat map."""
    if blocks == rows:
        return f"{blocks} blocks, most used at the end on top"
    return f"{blocks:,} blocks in {rows} groups,\nmost used at the end on top"


def _label_steps(axes: Any, steps: Sequence[int]) -> None:
    """Label about six columns with their steps."""
    labelled = range(0, len(steps), max(1, -(-len(steps) // 6)))
    axes.set_xticks(list(labelled), labels=[f"{steps[at]}" for at in labelled])


def _square(axes: Any, layer: int, size: int) -> None:
    axes.set_aspect("equal")
    axes.set_title(f"layer {layer}")
    axes.set_xlabel(f"{size} most used blocks, alike together")
    axes.set_xticks([])
    axes.set_yticks([])


def _colours(count: int) -> list[Any]:
    """A colour for each layer, from the first to the last."""
    if count <= LEGEND:
        return [f"C{at}" for at in range(count)]
    return list(matplotlib.colormaps["viridis"](numpy.linspace(0, 0.95, count)))


def _clip(text: str, most: int = 12) -> str:
    """A token's text as it can be plotted, shortened if it is long."""
    visible = shown(text, drawable=_has_glyph)
    return visible if len(visible) <= most else visible[: most - 1] + "…"


def _has_glyph(sign: str) -> bool:
    return bool(_font().get_char_index(ord(sign)))


@cache
def _font() -> Any:
    return get_font(findfont("DejaVu Sans"))
