"""Plans as tables, flat records, and a plot.

Inputs: outcomes of a search. Outputs: text, dicts for JSON and CSV, a plot.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sffn.planning.block_estimates import MEASURED_ON_CPU
from megatron_sffn.planning.candidates import SIZES
from megatron_sffn.planning.loss import Foreseen
from megatron_sffn.planning.loss_text import loss_fields
from megatron_sffn.planning.reasons import why_best, why_not
from megatron_sffn.planning.search import SECONDS_PER_DAY, Outcome, Plan
from megatron_sffn.utils.human_size import human_count, human_size
from megatron_sffn.utils.text_table import text_table
from megatron_sffn.utils.tool_output import save_plot

LAYOUT = ("TP", "PP", "VP", "EP", "ETP", "MB", "recompute")
"""Headings of a layout; VP is chunks of a stage, MB sequences of a microbatch."""

RESULTS = ("memory", "step s", "MFU", "tokens/s", "tokens/day", "days", "cost")

FASTER_SHOWN = 3
"""Layouts that would be faster than the best but do not fit, shown at most."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """The best layout of one number of GPUs and one block size.

    Args:
        gpus: number of GPUs.
        block_size: g; None for the one that the flags give.
        outcome: None if there is a reason.
        reason: a sentence.
        foreseen: of the loss; None if it is not asked for.
    """

    gpus: int
    block_size: int | None
    outcome: Outcome | None = None
    reason: str | None = None
    foreseen: Foreseen | None = None


def layouts_table(outcome: Outcome, tokens: float | None, top: int) -> str:
    """The best layouts, then faster ones that do not fit, with a reason for each."""
    best = outcome.best
    faster = [plan for plan in outcome.too_large if plan.time.total < best.time.total]
    plans = [*outcome.plans[:top], *faster[:FASTER_SHOWN]]
    reasons = ["why", why_best(outcome), *(why_not(plan, best) for plan in plans[1:])]
    rows = [(*LAYOUT, *RESULTS), *(_cells(plan, tokens) for plan in plans)]
    lines = [
        f"{row}  {reason}"
        for row, reason in zip(text_table(rows).splitlines(), reasons, strict=True)
    ]
    return "\n".join([*lines, "", *_counts(outcome)])


def _cells(plan: Plan, tokens: float | None) -> tuple[str, ...]:
    """The layout and the results of a plan."""
    sizes = (str(getattr(plan.candidate, name)) for name in SIZES.values())
    cost = None if tokens is None else plan.cost(tokens)
    rate = plan.tokens_per_second
    return (
        *sizes,
        plan.recompute,
        human_size(plan.memory.total),
        f"{plan.time.total:.3g}",
        f"{plan.mfu:.1%}",
        human_count(rate).strip(),
        human_count(rate * SECONDS_PER_DAY).strip(),
        "-" if tokens is None else f"{plan.days(tokens):.3g}",
        "-" if cost is None else f"{cost:,.0f}",
    )


def _counts(outcome: Outcome) -> list[str]:
    """How many layouts were looked at."""
    lines = [
        f"{len(outcome.plans):,} layouts fit, {len(outcome.too_large):,} do not fit, "
        f"{outcome.refused.total():,} are refused"
    ]
    if outcome.refused:
        counts = (f"{flag} ({count:,})" for flag, count in outcome.refused.most_common())
        lines.append(f"refused for: {', '.join(counts)}")
    return lines


def winner(plan: Plan) -> str:
    """The memory, the traffic and the flags of the best layout."""
    memory, traffic = plan.memory, plan.traffic
    kinds = ("weights", "gradients", "optimizer", "router_tables", "activations")
    held = (f"{kind.replace('_', ' ')} {human_size(getattr(memory, kind))}" for kind in kinds)
    sent = (
        f"{kind} {human_size(getattr(traffic, kind))}"
        for kind in ("tensor", "expert", "gradients", "parameters", "pipeline")
    )
    return "\n".join(
        [
            f"memory of the fullest rank: {' · '.join(held)}",
            f"sent by a rank in a step: {human_size(traffic.total)} = {' · '.join(sent)}; of "
            f"expert, {human_size(traffic.expert_network)} leave the node",
            f"flags of the best: {shlex.join(plan.candidate.flags())}",
        ]
    )


def cases_table(cases: Sequence[Case], tokens: float | None) -> str:
    """The best layout of each number of GPUs and block size; below it reasons of the others."""
    headings = ("GPUs", "g", *LAYOUT, *RESULTS, "blocks/dense", "CPU/dense")
    rows: list[tuple[str, ...]] = [headings]
    for case in cases:
        name = (f"{case.gpus:,}", "" if case.block_size is None else str(case.block_size))
        if case.outcome is None:
            rows.append((*name, *"-" * (len(headings) - 2)))
            continue
        best = case.outcome.best
        rows.append((*name, *_cells(best, tokens), *_ratios(best)))
    reasons = [
        f"{case.gpus:,} GPUs{'' if case.block_size is None else f', g = {case.block_size}'}: "
        f"{case.reason}"
        for case in cases
        if case.reason is not None
    ]
    return "\n".join(
        [
            text_table(rows),
            "",
            "blocks/dense: time of the block products over dense ones, derived (roofline) or "
            "given; CPU/dense: measured on a CPU, commit aa31707, not used",
            *reasons,
        ]
    )


def _ratios(plan: Plan) -> tuple[str, str]:
    """The derived ratio of the block products, and the measured one of the nearest setting."""
    sffn, ratio = plan.workload.shape.sffn, plan.time.block_ratio
    if sffn is None or ratio is None:
        return "-", "-"
    measured = MEASURED_ON_CPU.get((sffn.block_size, sffn.expansion))
    return f"{ratio:.2f}", "-" if measured is None else f"{measured:.2f}"


def record(
    plan: Plan, tokens: float | None, reason: str, foreseen: Foreseen | None = None
) -> dict[str, Any]:
    """A plan as one flat record, for JSON and CSV."""
    sffn = plan.workload.shape.sffn
    return {
        "gpus": plan.cluster.gpus,
        "block_size": None if sffn is None else sffn.block_size,
        **dataclasses.asdict(plan.candidate),
        "recompute": plan.recompute,
        "fits": plan.fits,
        "reason": reason,
        "step_seconds": plan.time.total,
        "mfu": plan.mfu,
        "tokens_per_second": plan.tokens_per_second,
        "tokens_per_day": plan.tokens_per_second * SECONDS_PER_DAY,
        "days": None if tokens is None else plan.days(tokens),
        "cost": None if tokens is None else plan.cost(tokens),
        "memory": plan.memory.total,
        **{f"memory_{name}": value for name, value in dataclasses.asdict(plan.memory).items()},
        **{f"sent_{name}": value for name, value in dataclasses.asdict(plan.traffic).items()},
        **{f"seconds_{name}": value for name, value in dataclasses.asdict(plan.time).items()},
        **({} if foreseen is None else loss_fields(foreseen)),
        "provenance": "derived",
    }


def records(
    outcome: Outcome, tokens: float | None, top: int, foreseen: Foreseen | None = None
) -> list[dict[str, Any]]:
    """The best layouts as records."""
    first, *others = outcome.plans[:top]
    return [
        record(first, tokens, why_best(outcome), foreseen),
        *(record(plan, tokens, why_not(plan, first), foreseen) for plan in others),
    ]


def plot(cases: Sequence[Case], tokens: float, path: Path) -> None:
    """Cost over the number of GPUs, a line for each block size; and the other way round.

    Args:
        cases: to plot; those without an outcome are left out.
        tokens: budget.
        path: path of the PNG or SVG file.

    Raises:
        ConfigError: if the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    over_gpus, over_sizes = _costs(cases, tokens)
    count = 2 if over_sizes else 1
    figure, axes = pyplot.subplots(
        1, count, figsize=(6.2 * count, 4.6), layout="constrained", sharey=True, squeeze=False
    )
    _plot_lines(axes[0][0], over_gpus, "number of GPUs", "block size g")
    if over_sizes:
        _plot_lines(axes[0][1], over_sizes, "block size g", "GPUs")
    price = next(case.outcome.best.cluster.price for case in cases if case.outcome is not None)
    unit = f"cost, at {price:g} per GPU hour" if price else "GPU hours"
    axes[0][0].set_ylabel(f"{unit} (derived)")
    figure.suptitle(f"Best layouts for {human_count(tokens).strip()} tokens")
    save_plot(figure, path)


Lines = dict[int | None, dict[int, float]]
"""Name of a line -> its points."""


def _costs(cases: Sequence[Case], tokens: float) -> tuple[Lines, Lines]:
    """Costs by block size and GPUs, and by GPUs and block size; GPU hours without a price."""
    over_gpus: Lines = {}
    over_sizes: Lines = {}
    for case in cases:
        if case.outcome is not None:
            best = case.outcome.best
            cost = best.cost(tokens) or best.days(tokens) * 24 * case.gpus
            over_gpus.setdefault(case.block_size, {})[case.gpus] = cost
            if case.block_size is not None:
                over_sizes.setdefault(case.gpus, {})[case.block_size] = cost
    return over_gpus, over_sizes


def _plot_lines(axes: Any, lines: Lines, x_label: str, line_label: str) -> None:
    """One line for each key, over logarithmic axes, darker for larger keys."""
    from matplotlib import colormaps
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
    names = sorted(lines, key=lambda name: name or 0)
    shades = colormaps["viridis_r"]
    for index, name in enumerate(names):
        colour = shades(0.1 + 0.9 * index / max(1, len(names) - 1))
        label = "as given" if name is None else f"{name:,}"
        points = zip(*sorted(lines[name].items()), strict=True)
        axes.plot(*points, color=colour, marker="o", markersize=4, label=label)
    ticks = sorted({point for points in lines.values() for point in points})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=45)
    axes.set_xlabel(x_label)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.legend(title=line_label, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
