"""Writes the rows of products.csv and layers.csv, and reads them back within a run."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu import results
from benchmarks.gpu.case import Context
from benchmarks.gpu.problem import Size
from benchmarks.machine import Platform, facts, version_of
from benchmarks.rows import append


@dataclass(frozen=True, kw_only=True)
class Row:
    """One time; also the columns of both files.

    Args:
        date: date of the run, ISO 8601, UTC.
        commit: short hash; `-dirty` if files differ from it; empty outside of git.
        device: name of the card.
        torch: version.
        megatron_core: version.
        triton: version.
        dtype: dtype of tokens and tables.
        block_size: g.
        expansion: E.
        tokens: T.
        hidden_size: D.
        active_cells: k.
        contender: name of a module, a backend, a router or a peer.
        what: name of a product, or `forward + backward`.
        repeats: number of repetitions.
        ms: the median.
        spread: interquartile range over the median.
        ratio: over the dense product, or the dense FFN of k cells, of the same T and D.
        peak_bytes: most bytes allocated while it ran.
    """

    date: str
    commit: str
    device: str
    torch: str
    megatron_core: str
    triton: str
    dtype: str
    block_size: int
    expansion: int
    tokens: int
    hidden_size: int
    active_cells: int
    contender: str
    what: str
    repeats: int
    ms: float
    spread: float
    ratio: float
    peak_bytes: int


@functools.cache
def common() -> dict[str, Any]:
    """Date, commit, device and versions."""
    return {**facts(Platform.here(), None), "triton": version_of("triton")}


def row_of(size: Size, measured: Any, *, contender: str, what: str, unit: float) -> Row:
    """A row of the files.

    Args:
        size: size of the problem.
        measured: the result of `clock.measure`.
        contender: a module, a backend, a router or a peer.
        what: name of the timed pass or product.
        unit: milliseconds of the dense form.
    """
    return Row(
        **common(),
        dtype=str(size.dtype).removeprefix("torch."),
        block_size=size.cells,
        expansion=size.expansion,
        tokens=size.tokens,
        hidden_size=size.width,
        active_cells=size.active,
        contender=contender,
        what=what,
        repeats=len(measured.ms),
        ms=measured.median,
        spread=measured.spread,
        ratio=measured.median / unit,
        peak_bytes=measured.peak,
    )


def write(rows: Sequence[Row], name: str, context: Context) -> None:
    """Append rows to a CSV file of the results, and record them for `rows_of_run`."""
    if rows:
        append(rows, context.out / name)
        with (context.scratch / name).with_suffix(".jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(dataclasses.asdict(row)) + "\n" for row in rows)


def rows_of_run(name: str, context: Context) -> list[Row]:
    """The rows that this run of the section has written, in all of its processes."""
    path = (context.scratch / name).with_suffix(".jsonl")
    return [Row(**fields) for fields in results.read_lines(path)]
