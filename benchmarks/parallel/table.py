"""The results of `benchmarks.parallel`: rows of a CSV file, a table, and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.rows import columns


@dataclass(frozen=True, kw_only=True)
class Row:
    """One block size and dispatcher on one number of ranks; also the columns of the CSV file.

    Times are of forward and backward; bytes are of a forward pass, per token.
    """

    device: str
    transport: str
    torch: str
    megatron_core: str
    ranks: int
    tokens: int
    hidden_size: int
    active_cells: int
    expansion: int
    block_size: int
    active_blocks: int
    blocks: int
    dispatcher: str
    chosen: bool
    repeats: int
    dense_ms: float
    ours_over_dense: float
    megatron_over_dense: float
    megatron_over_ours: float
    best_megatron_over_ours: float
    ours_bytes: float
    ours_closed_form: float
    megatron_bytes: float
    megatron_closed_form: float
    bytes_megatron_over_ours: float
    rows_over_dense: float
    latency_over_dense: float


COLUMNS = columns(Row)


HEADINGS = (
    ("", "g"),
    ("", "K"),
    ("", "B"),
    ("", "dispatcher"),
    ("", ""),
    ("ours", "/dense"),
    ("Megatron", "/dense"),
    ("Megatron", "/ours"),
    ("best M", "/ours"),
    ("ours", "counted"),
    ("closed", "form"),
    ("Megatron", "counted"),
    ("closed", "form"),
    ("Megatron", "/ours"),
)


def table(rows: Sequence[Row]) -> str:
    """The rows of one number of ranks as a table."""
    first = rows[0]
    lines = [*zip(*HEADINGS, strict=True), *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    before_bytes = sum(widths[:9]) + 9
    title = "time, forward + backward ".rjust(before_bytes)
    return "\n".join(
        [
            f"\n{first.ranks} ranks over {first.transport}, {first.device}; torch {first.torch}, "
            f"megatron-core {first.megatron_core}",
            f"T = {first.tokens} tokens a rank, D = {first.hidden_size}, k = {first.active_cells}, "
            f"E = {first.expansion}, fp32, router switch\n",
            title + "bytes per token, forward".rjust(sum(widths[9:]) + 4),
            *(" ".join(map(str.rjust, line, widths)) for line in lines),
            "* chosen by comm_volume.cheapest_dispatcher; best M: the faster of Megatron's two",
            *transport_notes(rows),
        ]
    )


def _cells(row: Row) -> tuple[str, ...]:
    times = (
        row.ours_over_dense,
        row.megatron_over_dense,
        row.megatron_over_ours,
        row.best_megatron_over_ours,
    )
    sent = (
        row.ours_bytes,
        row.ours_closed_form,
        row.megatron_bytes,
        row.megatron_closed_form,
    )
    return (
        *map(str, (row.block_size, row.active_blocks, row.blocks)),
        row.dispatcher,
        "*" if row.chosen else "",
        *(f"{value:.2f}" for value in times),
        *(f"{value:,.0f}" for value in sent),
        f"{row.bytes_megatron_over_ours:.2f}",
    )


def transport_notes(rows: Sequence[Row]) -> list[str]:
    """Lines about the cost of the bare exchange, and how much of it depends on bytes."""
    all_rows = median(row.rows_over_dense for row in rows)
    latency = median(row.latency_over_dense for row in rows)
    notes = [
        f"all-to-all of T rows, forward + backward: {all_rows:.2f} of dense; of one row per rank: "
        f"{latency:.2f}"
    ]
    if latency > all_rows / 2:
        notes.append("T and D are so small that latency dominates, and bytes matter little")
    if rows[0].transport == "gloo":
        notes.append("the reduce-scatter of allgather sends twice the counted bytes over gloo")
    return notes


def plot(rows: Sequence[Row], path: Path) -> None:
    """Plot counted bytes over the block size, a panel per number of ranks.

    Times are left to the table: on a shared machine they vary too much for a line.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    all_ranks = sorted({row.ranks for row in rows})
    figure, (panels,) = pyplot.subplots(
        1,
        len(all_ranks),
        figsize=(1.5 + 4 * len(all_ranks), 3.6),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for ranks, axes in zip(all_ranks, panels, strict=True):
        _plot_panel(axes, [row for row in rows if row.ranks == ranks])
        axes.set_title(f"{ranks} ranks")
    panels[0].set_ylabel("bytes sent per token, forward")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _plot_panel(axes: Any, rows: Sequence[Row]) -> None:
    """Plot one number of ranks."""
    for dispatcher, style in (("alltoall", "-"), ("allgather", "--")):
        lines = [row for row in rows if row.dispatcher == dispatcher]
        sizes = [row.block_size for row in lines]
        ours, megatrons = ([row.ours_bytes for row in lines], [row.megatron_bytes for row in lines])
        axes.plot(sizes, ours, f"C0o{style}", label=f"ours, {dispatcher}")
        axes.plot(sizes, megatrons, f"C1s{style}", label=f"Megatron, {dispatcher}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({row.block_size for row in rows})
    axes.set_xticks(ticks, map(str, ticks))
    axes.set_xlabel("block size g")
    axes.grid(alpha=0.3)
