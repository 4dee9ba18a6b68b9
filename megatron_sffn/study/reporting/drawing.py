"""The style of the figures of a report, and how they become files.

Inputs: matplotlib figures. Outputs: PNG and SVG files, and `<svg>` elements for a page.

Design notes: text and axes of an SVG have the colour of the page's text (`currentColor`), so that a
figure suits light and dark pages. Ids are global in a page, so each figure has a prefix.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from megatron_sffn.utils.atomic_files import atomic_path, atomic_write_text

INK = "#010203"
"""Placeholder for the page's text colour while matplotlib draws."""
GREY = "#7a8899"
"""Colour of the dense model."""
COLOURS = (
    *("#d9622b", "#3b82c4", "#3f9b57", "#b0479a", "#c79a1e"),
    *("#6f63c9", "#1fa3a3", "#a3564a", "#8a9a2f"),
)
MARKERS = "osD^vPX<>"
DENSE_STYLE = (GREY, "*")
LINE_STYLES = ("-", "--", "-.", ":")
"""Of the sizes of a study, in turn."""

STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "grid.alpha": 0.2,
    "grid.color": INK,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure of the page.

    Args:
        name: of its files, without an ending.
        title: its heading.
        text: how to read it.
        figure: what matplotlib drew.
    """

    name: str
    title: str
    text: str
    figure: Any


@contextmanager
def panels(count: int, columns: int = 3, height: float = 3.4) -> Iterator[tuple[Any, list[Any]]]:
    """A figure and its panels, drawn in our style.

    Args:
        count: number of panels.
        columns: panels next to each other at most.
        height: of a panel in inches.
    """
    columns = min(count, columns)
    lines = -(-count // columns)
    width = 6.5 if columns == 1 else 4.3 * columns
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height * lines), layout="constrained")
        axes = list(figure.subplots(lines, columns, squeeze=False).flatten())
        for empty in axes[count:]:
            empty.set_axis_off()
        yield figure, axes[:count]


def colours(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Name -> colour and marker, in the order of first appearance."""
    return {
        name: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)])
        for i, name in enumerate(dict.fromkeys(names))
    }


def shades(count: int) -> list[Any]:
    """Colours in an order that can be seen."""
    scale = matplotlib.colormaps["viridis"]
    return [scale(0.05 + 0.8 * i / max(count - 1, 1)) for i in range(count)]


def log_axis(axes: Any, label: str) -> None:
    """A logarithmic axis whose labels do not overlap."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=5))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()
    axes.set_xlabel(label)


def block_size_axis(axes: Any, block_sizes: Sequence[int]) -> None:
    """A logarithmic axis with a tick for each block size."""
    ticks = sorted(set(block_sizes))
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, labels=[str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("block size g, cells")


def save(picture: Picture, folder: Path) -> str:
    """Write the PNG and the SVG of a figure.

    Returns:
        The `<svg>` element for a page.
    """
    with matplotlib.rc_context(STYLE):
        picture.figure.draw_without_rendering()
        picture.figure.set_layout_engine("none")  # the layout is the same in both files
        with atomic_path(folder / f"{picture.name}.png") as path:
            picture.figure.savefig(path, format="png", dpi=150)
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        picture.figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue().replace(INK, "currentColor")
    atomic_write_text(folder / f"{picture.name}.svg", text)
    element = text[text.index("<svg") :]
    element = re.sub(r'(id="|url\(#|href="#)', rf"\1{picture.name}-", element)
    return element.replace("<svg ", f'<svg role="img" aria-label="{picture.title}" ', 1)
