"""Writes the report of a study: a page, figures and tables.

Inputs: findings. Outputs in a folder: `index.html` (offline, with all figures inside), `figures/`
(PNG and SVG), `tables/` (Markdown and LaTeX), `report.json`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from megatron_sffn.scaling.surface_record import as_record
from megatron_sffn.study.reporting import drawing, figures, tables
from megatron_sffn.study.reporting.conclusions import Conclusions, conclude
from megatron_sffn.study.reporting.findings import Findings
from megatron_sffn.study.reporting.orderings import Ordering
from megatron_sffn.utils.atomic_files import atomic_write_text

TEMPLATE = "report.html.jinja"


def write(findings: Findings, title: str, folder: Path) -> Path:
    """Write all files of a report.

    Args:
        findings: what the study found.
        title: of the page.
        folder: of the files, which is made.

    Returns:
        The path of the page.
    """
    for name in ("figures", "tables"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    pictures = [
        (picture, Markup(drawing.save(picture, folder / "figures")))
        for picture in figures.pictures(findings)
    ]
    made = tables.tables(findings)
    for table in made:
        tables.save(table, folder / "tables")
    conclusions = conclude(findings)
    atomic_write_text(folder / "report.json", json.dumps(as_json(findings, conclusions), indent=2))
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        undefined=StrictUndefined,
    )
    page = environment.get_template(TEMPLATE).render(
        title=title, conclusions=conclusions, pictures=pictures, tables=made
    )
    path = folder / "index.html"
    atomic_write_text(path, page)
    return path


def as_json(findings: Findings, conclusions: Conclusions) -> dict[str, Any]:
    """The findings as numbers."""
    points = []
    for point in findings.points:
        gain = findings.gain_of(point)
        points.append(
            {
                "point": point.name,
                "router": point.router,
                "block_size": point.block_size,
                **vars(point.size),
                "lr": point.lr,
                "seeds": point.seeds,
                "loss": point.loss,
                "spread": point.spread,
                "speedup": gain.mean.time if gain else None,
                "speedup_flops": gain.mean.compute if gain else None,
            }
        )
    return {
        "conclusions": {part.heading: list(part.sentences) for part in conclusions.parts},
        "points": points,
        "orderings": [_ordering(item) for item in findings.orderings],
        "learning_rates": [
            {**vars(valley), "size": vars(valley.size)} for valley in findings.valleys
        ],
        "baseline_law": vars(findings.law),
        "surfaces": {series: _surface(findings, series) for series in findings.surfaces},
    }


def _surface(findings: Findings, series: str) -> dict[str, Any]:
    """A fitted surface with all that a plan needs to evaluate it (`plan --loss-from`)."""
    surface = findings.surfaces[series]
    points = [point for point in findings.points if point.series == series]
    expansions = [point.means["expansion"] for point in points if "expansion" in point.means]
    return {
        "router": points[0].router,
        "expansions": sorted(set(expansions)),
        **as_record(surface),
        "best_granularity": surface.best_granularity(),
    }


def _ordering(ordering: Ordering) -> dict[str, Any]:
    return {
        "better": ordering.better.name,
        "worse": ordering.worse.name,
        "difference": ordering.difference,
        "p_value": ordering.p_value,
        "holds": ordering.holds,
    }
