"""The figures of training itself: learning rates, and losses over time.

Inputs: findings. Outputs: pictures, if the study has their numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_sffn.study.learning_rates import Valley
from megatron_sffn.study.reporting import drawing
from megatron_sffn.study.reporting.drawing import GREY, Picture, log_axis, panels
from megatron_sffn.study.reporting.findings import Findings, size_label
from megatron_sffn.study.reporting.points import DENSE, Point

CURVES = 10
"""Training curves in a panel."""
SMOOTHING = 50
"""A training curve is a running mean over a part of this number of its points."""


def valleys(findings: Findings) -> Picture | None:
    """Loss over learning rate, a panel for each router and size."""
    by_panel: dict[str, list[Valley]] = {}
    for valley in findings.valleys:
        if len(valley.rates) > 1:
            name = findings.label(valley.size, valley.router)
            by_panel.setdefault(name, []).append(valley)
    if not by_panel:
        return None
    with panels(len(by_panel)) as (figure, axes):
        for panel, (title, shown) in zip(axes, by_panel.items(), strict=True):
            for valley, colour in zip(shown, drawing.shades(len(shown)), strict=True):
                panel.plot(
                    valley.rates, valley.losses, color=colour, marker=".", label=valley.point
                )
                if valley.optimum:
                    panel.plot(*valley.optimum, color=colour, marker="*", markersize=11)
                elif valley.at_edge:
                    lowest = (valley.best, min(valley.losses))
                    panel.plot(*lowest, color=colour, marker="x", markersize=10)
            log_axis(panel, "learning rate")
            panel.set_title(title)
            panel.legend(fontsize=7)
        axes[0].set_ylabel("validation loss, nats per token")
    text = (
        "Mean loss over seeds for each learning rate. A star is the bottom of a parabola through "
        "the best rate and its neighbours; a cross is a best rate at the edge of its ladder, "
        "where a better one may lie beyond."
    )
    return Picture(name="learning_rates", title="Learning rates", text=text, figure=figure)


def curves(findings: Findings) -> Picture | None:
    """Losses over the course of training, one run for each of the best settings."""
    losses = findings.results.losses
    names = list(dict.fromkeys(losses["set"]))
    shown_set = "training" if "training" in names else next(iter(names), None)
    losses = losses[losses["set"] == shown_set]
    runs = set(losses["run"])
    sizes = [s for s in findings.sizes if any(p.size == s for p in _with_curve(findings, runs))]
    if not sizes:
        return None
    with panels(len(sizes), columns=2, height=4) as (figure, axes):
        for panel, size in zip(axes, sizes, strict=True):
            points = sorted(
                (point for point in _with_curve(findings, runs) if point.size == size),
                key=lambda point: (point.router != DENSE, point.loss),
            )[:CURVES]
            for point, colour in zip(points, [GREY, *drawing.shades(len(points))], strict=False):
                run = next(run for run in point.runs if run in runs)
                curve = losses[losses["run"] == run].sort_values("tokens")
                window = max(1, len(curve) // SMOOTHING)
                smooth = curve["loss"].rolling(window, min_periods=1).mean()
                panel.plot(curve["tokens"], smooth, color=colour, label=point.name, linewidth=1.2)
            _fit_later_losses(panel)
            panel.set_title(size_label(size))
            panel.set_xlabel("tokens")
            panel.legend(fontsize=7, loc="upper right")
        axes[0].set_ylabel(f"{shown_set} loss, nats per token")
    text = (
        f"A running mean of the {shown_set} loss of the first seed at the best learning rate: the "
        f"dense model and the best settings, at most {CURVES} in a panel."
    )
    return Picture(name="training_curves", title="Training", text=text, figure=figure)


def _with_curve(findings: Findings, runs: set[str]) -> Iterator[Point]:
    return (point for point in findings.points if runs.intersection(point.runs))


def _fit_later_losses(panel: Any) -> None:
    """Losses fall from ln(vocabulary) in the first steps; the axis fits the later ones."""
    later = [
        loss for line in panel.lines for loss in line.get_ydata()[len(line.get_ydata()) // 8 :]
    ]
    margin = 0.05 * (max(later) - min(later)) or 0.1
    panel.set_ylim(min(later) - margin, max(later) + margin)
