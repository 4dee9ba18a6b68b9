"""The figures of a report: loss, cost, speedup and balance; and the list of all figures.

Inputs: findings. Outputs: pictures. A picture whose numbers the study does not have is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_sffn.scaling.laws import ling_leverage
from megatron_sffn.scaling.speedup import Speedup
from megatron_sffn.study.reporting import drawing
from megatron_sffn.study.reporting.drawing import (
    DENSE_STYLE,
    GREY,
    INK,
    LINE_STYLES,
    Picture,
    block_size_axis,
    log_axis,
    panels,
)
from megatron_sffn.study.reporting.findings import Findings, size_label
from megatron_sffn.study.reporting.gains import Gain
from megatron_sffn.study.reporting.points import DENSE, Point
from megatron_sffn.study.reporting.scale_figure import scaling
from megatron_sffn.study.reporting.training_figures import curves, valleys

LING_COMPUTE = 1e18
"""FLOPs from which on Ling's law is drawn. At 10^16.2 its exponent changes sign."""


def pictures(findings: Findings) -> list[Picture]:
    """All figures whose numbers the study has."""
    draw = (loss_over_block_size, fronts, speedups, balance, valleys, curves, scaling)
    return [picture for function in draw if (picture := function(findings)) is not None]


def _styles(findings: Findings) -> dict[str, tuple[str, str]]:
    """Series -> colour and marker."""
    return drawing.colours([line[0].series for _, line in findings.lines()])


def _line_style(findings: Findings, line: Sequence[Point]) -> str:
    """The style of a line, by its size."""
    place = findings.sizes.index(line[0].size)
    return LINE_STYLES[place % len(LINE_STYLES)]


def loss_over_block_size(findings: Findings) -> Picture | None:
    """Loss over g for each router, with the spread over seeds."""
    if not findings.lines():
        return None
    styles = _styles(findings)
    with panels(len(findings.sizes)) as (figure, axes):
        for panel, size in zip(axes, findings.sizes, strict=True):
            panel.set_title(size_label(size))
            lines = [line for _, line in findings.lines() if line[0].size == size]
            for line in lines:
                colour, marker = styles[line[0].series]
                g = [point.block_size for point in line]
                loss = [point.loss for point in line]
                panel.plot(g, loss, color=colour, marker=marker, label=line[0].series)
                low = [point.loss - (point.spread or 0) for point in line]
                high = [point.loss + (point.spread or 0) for point in line]
                panel.fill_between(g, low, high, color=colour, alpha=0.15, linewidth=0)
            for point in findings.points:
                if point.size == size and point.router == DENSE:
                    _dense_band(panel, point)
            block_size_axis(panel, [p.block_size or 1 for line in lines for p in line])
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
    styles = _styles(findings)
    with panels(len(known), columns=2, height=4) as (figure, axes):
        for panel, name in zip(axes, known, strict=True):
            points = [point for point in findings.points if point.means.get(name)]
            for series in dict.fromkeys(point.series for point in points):
                colour, marker = styles.get(series, DENSE_STYLE)
                of_series = [point for point in points if point.series == series]
                x, y = [p.means[name] for p in of_series], [p.loss for p in of_series]
                panel.scatter(x, y, color=colour, marker=marker, label=series, zorder=3)
            front = pareto([(point.means[name], point.loss) for point in points])
            panel.step(*zip(*front, strict=True), where="post", color=INK, linewidth=1, alpha=0.6)
            log_axis(panel, costs[name])
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
    block_sizes = [gain.point.block_size for gain in findings.gains if gain.point.block_size]
    if not block_sizes:
        return None
    kinds = ["compute"]
    if any(gain.mean.time is not None for gain in findings.gains):
        kinds.insert(0, "time")
    styles = _styles(findings)
    with panels(len(kinds), columns=2, height=4) as (figure, axes):
        for panel, kind in zip(axes, kinds, strict=True):
            for label, line in findings.lines():
                gained = [gain for point in line if (gain := findings.gain_of(point))]
                colour, marker = styles[line[0].series]
                style = {"color": colour, "marker": marker, "label": label}
                style["linestyle"] = _line_style(findings, line)
                _speedup_line(panel, kind, gained, style)
            panel.axhline(1, color=GREY, linestyle="--", label=DENSE)
            panel.set_title("in seconds" if kind == "time" else "in FLOPs")
            block_size_axis(panel, block_sizes)
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


def _speedup_line(panel: Any, kind: str, gained: Sequence[Gain], style: dict[str, str]) -> None:
    def value(speedup: Speedup) -> float:
        return speedup.compute if kind == "compute" else speedup.time or float("nan")

    g = [gain.point.block_size for gain in gained]
    mean = [value(gain.mean) for gain in gained]
    panel.plot(g, mean, **style)
    low, high = ([value(getattr(gain, end)) for gain in gained] for end in ("low", "high"))
    panel.fill_between(g, low, high, color=style["color"], alpha=0.15, linewidth=0)


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
            label = f"Ling 2025, {size_label(size)}"
            panel.plot(g, leverage, color=INK, linestyle=":", label=label)


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
                colour, marker = styles[line[0].series]
                style = _line_style(findings, line)
                g = [point.block_size for point in line]
                values = [point.means.get(name, float("nan")) for point in line]
                panel.plot(g, values, style, color=colour, marker=marker, label=label)
            panel.set_ylabel(names[name])
            block_size_axis(panel, [point.block_size or 1 for point in sparse])
        axes[0].legend()
    text = (
        "The entropy of the load of the blocks over its maximum, and the share of blocks that no "
        "token of the last evaluation chose; means over layers and seeds. Poor balance makes small "
        "blocks look worse than they are."
    )
    return Picture(name="balance", title="Balance of the load", text=text, figure=figure)
