"""Plots the charts of the report as SVG elements, without scripts and fonts of their own.

Design notes: text and axes have the colour of the page's text (`currentColor`), so that a plot
suits light and dark pages.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.figure import Figure

INK = "#010203"
"""Placeholder for the page's text colour while matplotlib plots."""
COLOURS = ("#7a8899", "#d9622b")
SMOOTHING = 0.9
"""Weight of the earlier steps in the smoothed training loss: a mean over about 10 steps."""

STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.alpha": 0.2,
    "grid.color": INK,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Losses, and their steps."""

    steps: tuple[int, ...]
    losses: tuple[float, ...]

    def smoothed(self) -> tuple[float, ...]:
        """Running mean with exponential weights, unbiased at its start."""
        means, total, weight = [], 0.0, 0.0
        for loss in self.losses:
            total = SMOOTHING * total + (1 - SMOOTHING) * loss
            weight = SMOOTHING * weight + (1 - SMOOTHING)
            means.append(total / weight)
        return tuple(means)


@dataclass(frozen=True, kw_only=True)
class Load:
    """The load of the blocks of a layer in one evaluation.

    Args:
        iteration: iteration of the evaluation.
        layer: counted from 1.
        entropy: entropy of the load, over its maximum.
        dead: number of blocks that no token chose.
        tokens: number of tokens of each block.
    """

    iteration: int
    layer: int
    entropy: float
    dead: int
    tokens: tuple[int, ...]

    @property
    def shares(self) -> tuple[float, ...]:
        """The load of each block, in multiples of an even load."""
        even = max(sum(self.tokens), 1) / len(self.tokens)
        return tuple(tokens / even for tokens in self.tokens)


def losses(runs: Sequence[tuple[str, Curve, Curve]]) -> str:
    """Plot training and validation loss of each run against the steps."""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "losses"}):
        figure = Figure(figsize=(8, 4), layout="constrained")
        axes = figure.subplots()
        for (title, training, validation), colour in zip(runs, COLOURS, strict=True):
            axes.plot(training.steps, training.losses, color=colour, alpha=0.2, linewidth=0.8)
            axes.plot(
                training.steps,
                training.smoothed(),
                color=colour,
                linewidth=1.6,
                label=f"{title}, training",
            )
            axes.plot(
                validation.steps,
                validation.losses,
                color=colour,
                linestyle="--",
                marker="o",
                markersize=5,
                label=f"{title}, held-out",
            )
        axes.set_xlabel("step")
        axes.set_ylabel("loss, nats per token")
        # Losses fall from ln(vocabulary) in the first steps; the axis fits the later ones.
        later_losses = [
            loss for _, training, _ in runs for loss in training.losses[len(training.losses) // 8 :]
        ]
        later_losses += [loss for *_, validation in runs for loss in validation.losses]
        axes.set_ylim(min(later_losses) - 0.1, max(later_losses) + 0.2)
        axes.set_xlim(0, None)
        axes.legend(frameon=False, ncols=2)
        return svg(figure, "Training and held-out loss of each run")


def loads(layers: Sequence[Load]) -> str:
    """Plot the load of the blocks of each layer, in descending order."""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "loads"}):
        columns = min(len(layers), 4)
        lines = -(-len(layers) // columns)
        figure = Figure(figsize=(8, 2.1 * lines), layout="constrained")
        panels = figure.subplots(lines, columns, sharey=True, squeeze=False).flatten()
        for axes, load in zip(panels, layers, strict=False):
            axes.stairs(sorted(load.shares, reverse=True), fill=True, color=COLOURS[1])
            axes.axhline(1, color=INK, linewidth=0.8, linestyle=":")
            axes.set_title(f"layer {load.layer}", fontsize=10)
            axes.set_xticks([])
            axes.set_xlim(0, len(load.shares))
            axes.set_xlabel(f"{len(load.shares)} blocks")
        for axes in panels[len(layers) :]:
            axes.set_axis_off()
        panels[0].set_ylabel("× even load")
        return svg(figure, "Load of the blocks of each layer")


def svg(figure: Figure, title: str) -> str:
    """A figure as an `<svg>` element in the page's text colour."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    # Ids are global in a page, so the ids of each figure get a prefix.
    prefix = re.sub(r"\W+", "-", title.lower())
    text = re.sub(r'(id="|url\(#|href="#)', rf"\1{prefix}-", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)
