"""The tables of a report, in Markdown and LaTeX.

Inputs: findings. Outputs: tables of text. A column without any value is left out.

Design notes: pandas' Styler writes LaTeX and escapes it; it needs the LaTeX package booktabs.
Markdown is six lines here, for which pandas would need one more package.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas

from megatron_sffn.study.learning_rates import MIN_RATES, TRANSFERRED, Valley
from megatron_sffn.study.reporting.findings import Findings
from megatron_sffn.study.reporting.gains import Gain
from megatron_sffn.study.reporting.points import Point
from megatron_sffn.utils.atomic_files import atomic_write_text
from megatron_sffn.utils.human_size import human_count, human_size
from megatron_sffn.utils.human_time import human_time

MISSING = "–"


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of text.

    Args:
        name: of its files, without an ending.
        caption: one sentence.
        headings: of the columns.
        rows: cells.
    """

    name: str
    caption: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """The table in Markdown."""
        lines = [self.headings, ["---"] * len(self.headings), *self.rows]
        escaped = ([cell.replace("|", "\\|") for cell in line] for line in lines)
        return "".join(f"| {' | '.join(line)} |\n" for line in escaped)

    def latex(self) -> str:
        """The table in LaTeX, with everything escaped."""
        style = pandas.DataFrame(self.rows, columns=self.headings).style.hide(axis="index")
        style = style.format(escape="latex").format_index(axis="columns", escape="latex")
        text = style.to_latex(
            hrules=True,
            caption=self.caption,
            label=f"tab:{self.name}",
            position_float="centering",
            column_format="l" + "r" * (len(self.headings) - 1),
        )
        return str(text)


def tables(findings: Findings) -> list[Table]:
    """All tables that have rows."""
    made = (
        _settings(findings),
        _validation_sets(findings.points),
        _orderings(findings),
        _rates(findings.valleys),
    )
    return [table for table in made if table.rows]


def save(table: Table, folder: Path) -> None:
    """Write a table as Markdown and as LaTeX."""
    atomic_write_text(folder / f"{table.name}.md", table.markdown())
    atomic_write_text(folder / f"{table.name}.tex", table.latex())


def _table(name: str, caption: str, rows: Sequence[dict[str, str]]) -> Table:
    """A table of rows with equal keys, without the columns that have no value."""
    names = [key for key in (rows[0] if rows else {}) if any(row[key] != MISSING for row in rows)]
    cells = tuple(tuple(row[key] for key in names) for row in rows)
    return Table(name=name, caption=caption, headings=tuple(names), rows=cells)


def _settings(findings: Findings) -> Table:
    points = sorted(findings.points, key=lambda point: (point.size, point.loss))
    rows = [_setting(point, findings.gain_of(point)) for point in points]
    caption = (
        "Settings at their best learning rate, the best loss of each size first; losses are means "
        "and standard deviations over seeds, in nats per token."
    )
    return _table("settings", caption, rows)


def _setting(point: Point, gain: Gain | None) -> dict[str, str]:
    def shown(name: str, form: str) -> str:
        value = point.means.get(name)
        return MISSING if value is None else format(value, form)

    def count(name: str) -> str:
        value = point.means.get(name)
        return MISSING if value is None else human_count(value).strip()

    memory, seconds = (point.means.get(name) for name in ("peak_memory_bytes", "seconds"))
    spread = "" if point.spread is None else f" ± {point.spread:.4f}"
    time = gain.mean.time if gain else None
    return {
        "setting": point.name,
        "router": point.router,
        "g": MISSING if point.block_size is None else str(point.block_size),
        "E": MISSING if point.block_size is None else shown("expansion", "g"),
        "d": str(point.size.hidden_size or MISSING),
        "learning rate": f"{point.lr:.3g}" if point.lr else MISSING,
        "seeds": str(len(point.losses)),
        "loss": f"{point.loss:.4f}{spread}",
        "perplexity": f"{math.exp(min(point.loss, 700)):.2f}",
        "bits/byte": shown("bits_per_byte", ".4f"),
        "speedup": MISSING if time is None else f"{time:.2f}",
        "speedup in FLOPs": MISSING if gain is None else f"{gain.mean.compute:.2f}",
        "parameters": count("parameters_total"),
        "active": count("parameters_active"),
        "FLOPs": shown("training_flops", ".3g"),
        "tokens/s": count("tokens_per_second"),
        "time": MISSING if seconds is None else human_time(seconds),
        "memory": MISSING if memory is None else human_size(memory),
        "load entropy": shown("load_entropy", ".3f"),
        "dead blocks": shown("dead_blocks", ".1%"),
    }


def _validation_sets(points: Sequence[Point]) -> Table:
    """The loss of each validation set; empty for a study with a single set."""
    prefix = "loss."
    sets = dict.fromkeys(
        name.removeprefix(prefix)
        for point in points
        for name in point.means
        if name.startswith(prefix)
    )

    def shown(point: Point, name: str) -> str:
        loss, bits = (point.means.get(f"{kind}.{name}") for kind in ("loss", "bits_per_byte"))
        per_byte = "" if bits is None else f" ({bits:.4f})"
        return MISSING if loss is None else f"{loss:.4f}{per_byte}"

    rows = [
        {"setting": point.name, **{name: shown(point, name) for name in sets}}
        for point in sorted(points, key=lambda point: (point.size, point.loss))
    ]
    caption = "Loss of each validation set in nats per token, and in brackets in bits per byte."
    return _table("validation_sets", caption, rows if sets else [])


def _orderings(findings: Findings) -> Table:
    kinds = (
        ("holds", findings.holding),
        ("may be chance", findings.open),
        ("single seed", findings.untested),
    )
    rows = [
        {
            "better": ordering.better.name,
            "worse": ordering.worse.name,
            "difference": f"{ordering.difference:.4f}",
            "p": MISSING if ordering.p_value is None else f"{ordering.p_value:.2g}",
            "verdict": verdict,
        }
        for verdict, kind in kinds
        for ordering in kind
    ]
    caption = (
        "Pairs of settings: the difference of their mean losses in nats per token, and the p-value "
        "of Welch's test, corrected for the number of pairs by Holm's method."
    )
    return _table("orderings", caption, rows)


def _rates(valleys: Sequence[Valley]) -> Table:
    rows = [
        {
            "setting": valley.point,
            "rates": " ".join(f"{rate:.3g}" for rate in valley.rates),
            "best": f"{valley.best:.3g}",
            "bottom of the parabola": f"{valley.optimum[0]:.3g}" if valley.optimum else MISSING,
            "loss there": f"{valley.optimum[1]:.4f}" if valley.optimum else MISSING,
            "remark": _remark(valley),
        }
        for valley in valleys
    ]
    caption = "Learning rates that were trained, the best of them, and the bottom of a parabola."
    return _table("learning_rates", caption, rows)


def _remark(valley: Valley) -> str:
    if valley.at_edge:
        return "at the edge of the ladder"
    if valley.source == TRANSFERRED:
        return "transferred from another study"
    return "fewer than three rates" if len(valley.rates) < MIN_RATES else MISSING
