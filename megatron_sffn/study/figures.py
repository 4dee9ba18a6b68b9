"""The figures of a report: loss, cost, speedup, balance, learning rates and training over time.

Inputs: findings. Outputs: pictures. A picture whose numbers the study does not have is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from megatron_sffn.scaling.laws import ling_leverage
from megatron_sffn.scaling.speedup import Speedup
from megatron_sffn.study import drawing
from megatron_sffn.study.drawing import GREY, INK, Picture, block_size_axis, panels
from megatron_sffn.study.findings import Findings, size_label
from megatron_sffn.study.gains import Gain
from megatron_sffn.study.learning_rates import Valley
from megatron_sffn.study.points import DENSE, Point
from megatron_sffn.study.scale_figure import scaling

CURVES = 10
"""Training curves in a panel."""
SMOOTHING = 50
"""A training curve is a running mean over a part of this number of its points."""
LING_COMPUTE = 1e18
"""FLOPs from which on Ling's law is drawn. At 10^16.2 its exponent changes sign."""


def pictures(findings: Findings) -> list[Picture]:
    """All figures whose numbers the study has."""
    draw = (loss_over_block_size, fronts, speedups, balance, valleys, curves, scaling)
    return [picture for function in draw if (picture := function(findings)) is not None]


def _styles(findings: Findings) -> dict[str, tuple[str, str]]:
    """Label of a line -> colour and marker."""
    return drawing.colours([label for label, _ in findings.lines()])


def loss_over_block_size(findings: Findings) -> Picture | None:
    """Loss over g for each router, with the spread over seeds."""
    if not findings.lines():
        return None
    styles = _styles(findings)
    with panels(len(findings.sizes)) as (figure, axes):
        for panel, size in zip(axes, findings.sizes, strict=True):
            panel.set_title(size_label(size))
            lines = [(label, line) for label, line in findings.lines() if line[0].size == size]
            for label, line in lines:
                colour, marker = styles[label]
                g = [point.block_size for point in line]
                loss = [point.loss for point in line]
                panel.plot(g, loss, color=colour, marker=marker, label=line[0].series)
                low = [point.loss - (point.spread or 0) for point in line]
                high = [point.loss + (point.spread or 0) for point in line]
                panel.fill_between(g, low, high, color=colour, alpha=0.15, linewidth=0)
            for point in findings.points:
                if point.size == size and point.router == DENSE:
                    _dense_band(panel, point)
            block_size_axis(panel, [p.block_size or 1 for _, line in lines for p in line])
            panel.legend()
        axes[0].set_ylabel("validation loss, nats per token")
    text = (
        "Mean validation loss over seeds at the best learning rate of each setting. Bands are one "
        "standard deviation to each side; a line without a band has a single seed."
    )
    title = "Loss over block size"
    return Picture(name="loss_over_block_size", title=title, text=text, figure=figure)


def _dense_band(panel: Any, point: Point) -> None:
    panel.axhline(point.loss, color=GREY, linestyle="--", label=DENSE)
    if point.spread:
        low, high = point.loss - point.spread, point.loss + point.spread
        panel.axhspan(low, high, color=GREY, alpha=0.15, linewidth=0)


def fronts(findings: Findings) -> Picture | None:
    """Loss over FLOPs and over seconds, with the settings that no other one dominates."""
    costs = {"training_flops": "FLOPs of the training", "seconds": "seconds of the training"}
    known = [name for name in costs if any(name in point.means for point in findings.points)]
    if not known:
        return None
    styles = drawing.colours([p.series for p in findings.points if p.router != DENSE])
    with panels(len(known), columns=2, height=4) as (figure, axes):
        for panel, name in zip(axes, known, strict=True):
            points = [point for point in findings.points if point.means.get(name)]
            for series in dict.fromkeys(point.series for point in points):
                colour, marker = styles.get(series, (GREY, "s"))
                of_series = [point for point in points if point.series == series]
                x, y = [p.means[name] for p in of_series], [p.loss for p in of_series]
                panel.scatter(x, y, color=colour, marker=marker, label=series, zorder=3)
            front = pareto([(point.means[name], point.loss) for point in points])
            panel.step(*zip(*front, strict=True), where="post", color=INK, linewidth=1, alpha=0.6)
            panel.set_xscale("log")
            panel.set_xlabel(costs[name])
        axes[0].set_ylabel("validation loss, nats per token")
        axes[0].legend()
    text = (
        "Each mark is a setting; the stairs join those that no other one beats in both loss and "
        "cost. A router on the stairs in FLOPs but not in seconds loses its gain to routing."
    )
    return Picture(name="fronts", title="Loss and cost", text=text, figure=figure)


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points with a lower loss than every point of at most their cost.

    Args:
        points: cost and loss of each.
    """
    front: list[tuple[float, float]] = []
    for cost, loss in sorted(points):
        if not front or loss < front[-1][1]:
            front.append((cost, loss))
    return front


def speedups(findings: Findings) -> Picture | None:
    """Effective speedup over g, in seconds and in FLOPs."""
    gain_of = {gain.point.name: gain for gain in findings.gains if gain.point.block_size}
    if not gain_of:
        return None
    kinds = ["compute"]
    if any(gain.mean.time is not None for gain in gain_of.values()):
        kinds.insert(0, "time")
    styles = _styles(findings)
    with panels(len(kinds), columns=2, height=4) as (figure, axes):
        for panel, kind in zip(axes, kinds, strict=True):
            for label, line in findings.lines():
                gained = [gain for point in line if (gain := gain_of.get(point.name))]
                _speedup_line(panel, kind, gained, label, styles[label])
            panel.axhline(1, color=GREY, linestyle="--", label=DENSE)
            panel.set_title("in seconds" if kind == "time" else "in FLOPs")
            block_size_axis(panel, [gain.point.block_size or 1 for gain in gain_of.values()])
        _ling(axes[-1], findings)
        axes[0].set_ylabel("effective speedup over the dense model")
        axes[-1].legend()
    text = (
        "The time and the compute that the dense model needs for the loss of a setting, over those "
        "of the setting. Bands are one standard deviation of the loss over seeds. The law of the "
        f"dense model is {findings.law.source}: asymptote {findings.law.asymptote:.3f} nats, "
        f"exponent {findings.law.exponent:.3f}. Ling 2025 is a published leverage in FLOPs; it is "
        f"drawn for trainings of at least {LING_COMPUTE:.0e} FLOPs."
    )
    return Picture(name="effective_speedup", title="Effective speedup", text=text, figure=figure)


def _speedup_line(
    panel: Any, kind: str, gained: Sequence[Gain], label: str, style: tuple[str, str]
) -> None:
    def value(speedup: Speedup) -> float:
        return speedup.compute if kind == "compute" else speedup.time or float("nan")

    g = [gain.point.block_size for gain in gained]
    mean = [value(gain.mean) for gain in gained]
    panel.plot(g, mean, color=style[0], marker=style[1], label=label)
    low, high = ([value(getattr(gain, end)) for gain in gained] for end in ("low", "high"))
    panel.fill_between(g, low, high, color=style[0], alpha=0.15, linewidth=0)


def _ling(panel: Any, findings: Findings) -> None:
    """The leverage of Ling 2025 at the places of the points."""
    for size in findings.sizes:
        found = {}
        for point in findings.points:
            compute, expansion = (point.means.get(n, 0) for n in ("training_flops", "expansion"))
            if point.size == size and point.block_size and compute >= LING_COMPUTE and expansion:
                found[point.block_size] = ling_leverage(
                    expansion=expansion,
                    block_size=point.block_size,
                    hidden_size=size.hidden_size,
                    compute=compute,
                )
        if found and size.hidden_size:
            g, leverage = zip(*sorted(found.items()), strict=True)
            panel.plot(
                g, leverage, color=INK, linestyle=":", label=f"Ling 2025, {size_label(size)}"
            )


def balance(findings: Findings) -> Picture | None:
    """Load entropy and dead blocks over g."""
    names = {"load_entropy": "load entropy, 1 is even", "dead_blocks": "share of dead blocks"}
    sparse = [point for point in findings.points if point.block_size is not None]
    known = [name for name in names if any(name in point.means for point in sparse)]
    if not known:
        return None
    styles = _styles(findings)
    with panels(len(known), columns=2) as (figure, axes):
        for panel, name in zip(axes, known, strict=True):
            for label, line in findings.lines():
                colour, marker = styles[label]
                found = [(p.block_size, p.means[name]) for p in line if name in p.means]
                if found:
                    x_y = zip(*found, strict=True)
                    panel.plot(*x_y, color=colour, marker=marker, label=label)
            panel.set_ylabel(names[name])
            block_size_axis(panel, [point.block_size or 1 for point in sparse])
        axes[0].legend()
    text = (
        "The entropy of the load of the blocks over its maximum, and the share of blocks that no "
        "token of the last evaluation chose; means over layers and seeds. Poor balance makes small "
        "blocks look worse than they are."
    )
    return Picture(name="balance", title="Balance of the load", text=text, figure=figure)


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
            panel.set_xscale("log")
            panel.set_title(title)
            panel.set_xlabel("learning rate")
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
            panel.legend(fontsize=7)
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
