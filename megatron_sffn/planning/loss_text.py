"""Foreseen losses as lines under a plan, as a table over cases, and as fields of a record.

Inputs: a `Foreseen`, cases. Outputs: text, a dict.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from megatron_sffn.planning.loss import Foreseen
from megatron_sffn.scaling.forecast import Forecast
from megatron_sffn.utils.human_size import human_count
from megatron_sffn.utils.text_table import text_table

if TYPE_CHECKING:
    from megatron_sffn.planning.fitted_loss import FittedLoss
    from megatron_sffn.planning.report import Case

CAVEAT = (
    "extrapolated from other data and tokenizers; trust differences between losses, not their "
    "values"
)


def loss_lines(foreseen: Foreseen) -> str:
    """The loss of a plan: what each law says, their range, and the surface of a report."""
    tokens, low_high = human_count(foreseen.tokens).strip(), foreseen.range
    rows = [(law.law, _number(law.value, ".3f"), law.source) for law in foreseen.laws]
    if low_high is not None:
        rows.append(("range of these laws", "", f"{_range(*low_high)}: {CAVEAT}"))
    leverage = foreseen.leverage
    rows.append((f"{leverage.law}, leverage", _number(leverage.value, ".3g"), _leverage(leverage)))
    lines = [f"loss after {tokens} tokens, in nats per token, foreseen:"]
    if foreseen.fitted is not None:
        fit = foreseen.fitted
        rows.append((f"your surface, {fit.series}", f"{fit.loss:.3f}", _quantiles(fit)))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    lines += [f"  {a.ljust(widths[0])}  {b.rjust(widths[1])}  {c}".rstrip() for a, b, c in rows]
    if foreseen.fitted is not None and foreseen.fitted.remarks:
        lines.append(f"your surface is {_beyond(foreseen.fitted)}")
    return "\n".join([*lines, *_reasons([foreseen])])


def _leverage(leverage: Forecast) -> str:
    return f"compute of a dense model of equal loss over this one's; {leverage.source}"


def losses_table(cases: Sequence[Case]) -> str:
    """Tokens, days, cost and losses of each case in one row."""
    rows = [_case_cells(case) for case in cases if case.foreseen is not None]
    names = [name for name in rows[0] if any(row[name] != "-" for row in rows)]
    foreseen = [case.foreseen for case in cases if case.foreseen is not None]
    notes = [
        f"losses in nats per token; those of the laws are {CAVEAT}",
        f"leverage: {_leverage(foreseen[0].leverage)}",
    ]
    if foreseen[0].fitted is not None:
        notes.append(
            f"fitted: by your surface, {foreseen[0].fitted.series}; 10 % to 90 % of its bootstrap"
        )
    lines = [tuple(names), *(tuple(row[name] for name in names) for row in rows)]
    return "\n".join([text_table(lines), "", *notes, *_all_beyond(cases), *_reasons(foreseen)])


def _all_beyond(cases: Iterable[Case]) -> list[str]:
    """A line for all block sizes that are beyond the fitted runs in the same way."""
    sizes: dict[str, list[str]] = {}
    for case in cases:
        fit = None if case.foreseen is None else case.foreseen.fitted
        if fit is not None and fit.remarks:
            size = "as given" if case.block_size is None else str(case.block_size)
            sizes.setdefault(_beyond(fit), []).append(size)
    return [f"g {', '.join(dict.fromkeys(sizes[text]))}: {text}" for text in sizes]


def _case_cells(case: Case) -> dict[str, str]:
    foreseen, plan = case.foreseen, None if case.outcome is None else case.outcome.best
    assert foreseen is not None, "only cases with a loss have a row"
    cost = None if plan is None else plan.cost(foreseen.tokens)
    fit = foreseen.fitted
    return {
        "GPUs": f"{case.gpus:,}",
        "g": "-" if case.block_size is None else str(case.block_size),
        "tokens": human_count(foreseen.tokens).strip(),
        "days": "-" if plan is None else f"{plan.days(foreseen.tokens):.3g}",
        "cost": _number(cost, ",.0f"),
        **{law.law: _number(law.value, ".3f") for law in foreseen.laws},
        "leverage": _number(foreseen.leverage.value, ".3g"),
        "fitted": "-" if fit is None else f"{fit.loss:.3f} ({_range(fit.low, fit.high)})",
    }


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _range(low: float, high: float) -> str:
    return f"{low:.3f} to {high:.3f}"


def _quantiles(fitted: FittedLoss) -> str:
    return f"{_range(fitted.low, fitted.high)}, 10 % to 90 % of its bootstrap"


def _beyond(fitted: FittedLoss) -> str:
    return f"beyond the fitted runs: {', '.join(fitted.remarks)}"


def _reasons(all_foreseen: Iterable[Foreseen]) -> list[str]:
    """A line for each law that says nothing."""
    forecasts = [law for item in all_foreseen for law in (*item.laws, item.leverage)]
    lines = [f"{law.law} is left out: {law.reason}" for law in forecasts if law.reason]
    return list(dict.fromkeys(lines))


def loss_fields(foreseen: Foreseen) -> dict[str, Any]:
    """The losses as fields of a plan's record."""
    low, high = foreseen.range or (None, None)
    fit = foreseen.fitted
    names = {law.law: law.law.lower().replace(" ", "_").replace("-", "_") for law in foreseen.laws}
    return {
        "tokens": foreseen.tokens,
        **{f"loss_{names[law.law]}": law.value for law in foreseen.laws},
        "loss_laws_low": low,
        "loss_laws_high": high,
        "leverage_ling_2025": foreseen.leverage.value,
        "loss_left_out": "; ".join(_reasons([foreseen])),
        "loss_fitted": None if fit is None else fit.loss,
        "loss_fitted_low": None if fit is None else fit.low,
        "loss_fitted_high": None if fit is None else fit.high,
        "loss_fitted_beyond": None if fit is None else "; ".join(fit.remarks),
    }
