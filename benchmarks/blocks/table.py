"""The results of `benchmarks.blocks`: rows of a CSV file, a table, and a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from benchmarks.blocks.timing import PASSES
from megatron_sffn.utils.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Row:
    """One contender's pass at one size; also the columns of the CSV file.

    Args:
        date: date of the run, ISO 8601, UTC.
        commit: short hash; `-dirty` if files differ from it; empty outside of git.
        device: name of the device.
        threads: threads of torch on the CPU.
        torch: version of torch.
        megatron_core: version; empty if the package is absent.
        transformer_engine: version; empty if the package is absent.
        transformers: version; empty if the package is absent.
        triton: version; empty if the package is absent.
        dtype: dtype of tokens and tables.
        activation: f.
        gated: True if a gate multiplies each block's output.
        block_size: g.
        expansion: E.
        tokens: T.
        hidden_size: D.
        active_cells: k.
        contender: name of the module that was timed.
        pass_: `forward`, or `forward + backward`.
        repeats: number of turns.
        ms: median time of a turn.
        ratio: this median over the median of the dense FFN.
        spread: interquartile range of the turns over their median.
    """

    date: str
    commit: str
    device: str
    threads: int
    torch: str
    megatron_core: str
    transformer_engine: str
    transformers: str
    triton: str
    dtype: str
    activation: str
    gated: bool
    block_size: int
    expansion: int
    tokens: int
    hidden_size: int
    active_cells: int
    contender: str
    pass_: str
    repeats: int
    ms: float
    ratio: float
    spread: float


@dataclass(frozen=True, kw_only=True)
class Missing:
    """The reason why a contender has no ratio at one size."""

    contender: str
    block_size: int
    expansion: int
    reason: str


def rows_of(
    seconds: Mapping[tuple[str, str], Sequence[float]], common: Mapping[str, Any]
) -> list[Row]:
    """One row per contender and pass, from the seconds of every turn at one size."""
    rows = []
    for timed in PASSES:
        for name in dict.fromkeys(name for name, _ in seconds):
            turn_seconds = seconds[name, timed]
            middle = median(turn_seconds)
            low, _, high = (
                quantiles(turn_seconds) if len(turn_seconds) > 1 else (middle, middle, middle)
            )
            rows.append(
                Row(
                    **common,
                    contender=name,
                    pass_=timed,
                    repeats=len(turn_seconds),
                    ms=1000 * middle,
                    ratio=middle / median(seconds["dense", timed]),
                    spread=(high - low) / middle,
                )
            )
    return rows


def table(rows: Sequence[Row], missing: Sequence[Missing], contenders: Sequence[str]) -> str:
    """All rows as a table with a line per pass and size, and notes on missing ratios."""
    first = rows[0]
    cells = {(row.pass_, row.expansion, row.block_size, row.contender): row for row in rows}
    name_parts = [name.rpartition(" ") for name in contenders]
    lines: list[Sequence[str]] = [
        ("", "", "", "", "dense", *(first_line for first_line, _, _ in name_parts)),
        ("pass", "g", "E", "T", "ms", *(second_line for _, _, second_line in name_parts)),
    ]
    units = [row for row in rows if row.contender == "dense"]
    for timed in PASSES:
        for unit in (row for row in units if row.pass_ == timed):
            size = (timed, unit.expansion, unit.block_size)
            cells_in_order = (cells.get((*size, name)) for name in contenders)
            lines.append(
                (
                    timed,
                    *map(str, (unit.block_size, unit.expansion, unit.tokens)),
                    f"{unit.ms:.3g}",
                    *("-" if row is None else f"{row.ratio:.2f}" for row in cells_in_order),
                )
            )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    widest = max(rows, key=lambda row: row.spread)
    versions = ", ".join(
        f"{name.replace('_', '-')} {getattr(first, name)}"
        for name in ("torch", "megatron_core", "transformer_engine", "transformers", "triton")
        if getattr(first, name)
    )
    return "\n".join(
        [
            f"\n{first.device}, threads: {first.threads}; {versions}; commit {first.commit or '-'}",
            f"D = {first.hidden_size}, k = {first.active_cells}, {first.dtype}, "
            f"{first.activation}, {'with' if first.gated else 'without'} gates; times over a dense "
            "FFN of k cells\n",
            *(_line(line, widths) for line in lines),
            f"largest spread (interquartile range over median): {widest.spread:.0%}, "
            f"{widest.contender}, {widest.pass_}, g = {widest.block_size}, E = {widest.expansion}",
            *notes(missing),
        ]
    )


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    """One line of the table: the pass on the left, numbers on the right."""
    label, *numbers = cells
    return " ".join([label.ljust(widths[0]), *map(str.rjust, numbers, widths[1:])])


def notes(missing: Sequence[Missing]) -> list[str]:
    """Each reason once, with the sizes that it applies to."""
    sizes: dict[tuple[str, str], list[Missing]] = {}
    for ratio in missing:
        sizes.setdefault((ratio.contender, ratio.reason), []).append(ratio)
    return [
        f"- {contender}, "
        + ", ".join(f"g = {size.block_size} E = {size.expansion}" for size in missing_ratios)
        + f": {reason}"
        for (contender, reason), missing_ratios in sizes.items()
    ]


def plot(
    rows: Sequence[Row],
    contenders: Sequence[str],
    path: Path,
    passes: Sequence[str] = PASSES,
) -> None:
    """Plot ratios over the block size: a panel per pass and expansion, a line per contender.

    Raises:
        ConfigError: if the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    expansions = sorted({row.expansion for row in rows})
    figure, panels = pyplot.subplots(
        len(passes),
        len(expansions),
        figsize=(1.5 + 4 * len(expansions), 3.5 * len(passes)),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for timed, line in zip(passes, panels, strict=True):
        for expansion, axes in zip(expansions, line, strict=True):
            panel_rows = [row for row in rows if (row.pass_, row.expansion) == (timed, expansion)]
            _plot_panel(axes, panel_rows, contenders)
            axes.set_title(f"{timed}, E = {expansion}")
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.grid(alpha=0.3)
    ticks = sorted({row.block_size for row in rows})
    for axes in panels[-1]:
        axes.set_xticks(ticks, map(str, ticks))
        axes.set_xlabel("block size g")
    for axes in panels[:, 0]:
        axes.set_ylabel("time over dense")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2 * len(expansions))
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise ConfigError(
            f"--plot {path} cannot be written ({error}); give a path in a folder that exists"
        ) from error
    finally:
        pyplot.close(figure)


def _plot_panel(axes: Any, rows: Sequence[Row], contenders: Sequence[str]) -> None:
    """Plot one line per contender, with the same colour and marker in every panel."""
    axes.axhline(1, color="gray", linestyle="--", linewidth=1)
    for name, marker in zip(contenders, cycle("osD^vPX*"), strict=False):
        points = sorted((row.block_size, row.ratio) for row in rows if row.contender == name)
        axes.plot(
            [size for size, _ in points], [ratio for _, ratio in points], marker=marker, label=name
        )
