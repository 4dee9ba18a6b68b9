"""The figure of a study of several sizes: measured losses, fitted surfaces and published laws.

Inputs: findings. Outputs: a picture, if there are at least two sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy

from megatron_sffn.scaling.laws import granularity
from megatron_sffn.study.reporting import drawing
from megatron_sffn.study.reporting.drawing import (
    DENSE_STYLE,
    INK,
    Picture,
    block_size_axis,
    log_axis,
    panels,
)
from megatron_sffn.study.reporting.findings import MIN_SIZES, Findings, size_label
from megatron_sffn.study.reporting.points import DENSE, Point
from megatron_sffn.study.reporting.scale import observation, published_losses

LINE_STYLES = (":", "-.", (0, (1, 3)))


def scaling(findings: Findings) -> Picture | None:
    """Loss over compute for each series, and over g for each size along the fitted surface."""
    points = [point for point in findings.points if point.means.get("training_flops")]
    if len({point.size for point in points}) < MIN_SIZES:
        return None
    styles = drawing.colours([point.series for point in points if point.router != DENSE])
    surfaces = list(findings.surfaces)[:2]
    with panels(1 + len(surfaces), height=4.2) as (figure, axes):
        _over_compute(axes[0], findings, points, styles)
        for panel, series in zip(axes[1:], surfaces, strict=True):
            _over_block_size(panel, findings, series)
    text = (
        "Left: the best block size of each router at each size. Dashed lines are the fitted "
        "surface, bands its 10 % and 90 % quantiles over a bootstrap of the settings. Published "
        "laws go through the smallest dense model: they were fitted to other data, so only their "
        "slopes can be compared. Krajewski's law counts no embeddings; here it gets all parameters."
    )
    if surfaces:
        text += " Further panels: marks are measured, lines are the surface."
    return Picture(name="scaling", title="Scaling over sizes", text=text, figure=figure)


def _best(points: Sequence[Point], series: str) -> list[Point]:
    """The best point of a series at each size, by compute."""
    found: dict[Any, Point] = {}
    for point in sorted(points, key=lambda point: -point.loss):
        if point.series == series:
            found[point.size] = point
    return sorted(found.values(), key=lambda point: point.means["training_flops"])


def _over_compute(
    panel: Any, findings: Findings, points: Sequence[Point], styles: dict[str, tuple[str, str]]
) -> None:
    lines = {series: _best(points, series) for series in dict.fromkeys(p.series for p in points)}
    for series, line in lines.items():
        colour, marker = styles.get(series, DENSE_STYLE)
        compute = [point.means["training_flops"] for point in line]
        panel.plot(compute, [p.loss for p in line], color=colour, marker=marker, label=series)
        surface = findings.surfaces.get(series)
        places = [place for point in line if (place := observation(point))]
        if surface and places:
            x = [place.compute for place in places]
            panel.plot(x, [surface.loss(p) for p in places], color=colour, linestyle="--")
            low, high = zip(*(surface.interval(place) for place in places), strict=True)
            panel.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    reference = lines.get(DENSE) or next(iter(lines.values()))
    laws = published_losses(reference)
    for style, (name, losses) in zip(LINE_STYLES, laws.items(), strict=False):
        compute = [point.means["training_flops"] for point in reference]
        panel.plot(compute, losses, color=INK, linestyle=style, linewidth=1, label=name)
    log_axis(panel, "FLOPs of the training")
    panel.set_ylabel("validation loss, nats per token")
    panel.legend()


def _over_block_size(panel: Any, findings: Findings, series: str) -> None:
    surface = findings.surfaces[series]
    lines = [line for _, line in findings.lines() if line[0].series == series]
    for line, colour in zip(lines, drawing.shades(len(lines)), strict=True):
        places = [place for point in line if (place := observation(point))]
        if not places:
            continue
        g = [point.block_size or 1 for point in line]
        panel.plot(g, [point.loss for point in line], color=colour, marker="o", linestyle="")
        fine = numpy.geomspace(min(g), max(g), 40)
        width = line[0].size.hidden_size
        fitted = [surface.loss(replace(places[0], granularity=granularity(width, x))) for x in fine]
        panel.plot(fine, fitted, color=colour, label=size_label(line[0].size))
    block_size_axis(panel, [point.block_size or 1 for line in lines for point in line])
    panel.set_title(f"{series}: fitted surface")
    panel.legend(fontsize=7)
