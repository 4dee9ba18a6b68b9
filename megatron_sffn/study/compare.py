"""The results of runs as a table, and the settings in which the runs differ.

Inputs: finished runs. Outputs: rows of a table, and a sentence for each setting whose difference
makes the losses or the speeds incomparable.

Design notes: router, blocks, balance and learning rate are what runs are made to compare, so the
table or nobody tells of them. Data, evaluation, tokens, batch, model and tokenizer should be equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_sffn.study.runs import Run
from megatron_sffn.utils.human_size import human_count
from megatron_sffn.utils.text_table import text_table

COLUMNS = {
    "router": "router",
    "block_size": "g",
    "expansion": "E",
    "active_cells": "k",
    "parameters_total": "parameters",
    "parameters_active": "active",
    "flops_per_token": "FLOPs/token",
    "tokens": "tokens",
    "seed": "seed",
    "validation_loss": "loss",
    "validation_perplexity": "perplexity",
    "tokens_per_second": "tokens/s",
}
"""Key of `summary.json` -> heading of its column."""

COUNTS = ("parameters_total", "parameters_active", "flops_per_token", "tokens", "tokens_per_second")
"""Keys of numbers that are shown with a prefix."""

EVALUATION = (
    "valid_data_path",
    "sffn_eval_iters",
    "eval_global_batch_size",
    "full_validation",
    "sffn_validation_data",
)
"""Settings of the section `data` that choose what an evaluation reads."""

NO_MATTER = ("eval_interval", "sparse_layers", "sffn_layers", "sffn_relu", "micro_batch_size")
"""Settings that change no result, or that the table or the router tells of."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A setting in which runs differ.

    Args:
        subject: what is not comparable because of it.
        name: of the setting.
        values: value -> names of the runs that have it.
    """

    subject: str
    name: str
    values: dict[str, list[str]]

    def __str__(self) -> str:
        values = "; ".join(f"{value} in {_some(runs)}" for value, runs in self.values.items())
        return f"{self.subject} differ by {self.name}: {values}"


def _some(names: Sequence[str]) -> str:
    """Names in a sentence, at most three."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def results_table(runs: Sequence[Run]) -> str:
    """The runs as a table, best loss first; runs without a loss last."""

    def loss(run: Run) -> float:
        value = run.summary["validation_loss"]
        return float("inf") if value is None else float(value)

    rows = [[run.name, *(_cell(run, key) for key in COLUMNS)] for run in sorted(runs, key=loss)]
    return text_table([["run", *COLUMNS.values()], *rows])


def _cell(run: Run, key: str) -> str:
    value = run.summary.get(key)
    if value is None:
        return "-"
    if key in COUNTS:
        return human_count(value).strip()
    if isinstance(value, float):
        return f"{value:.2f}" if key == "validation_perplexity" else f"{value:.4f}"
    return str(value)


def differences(runs: Sequence[Run]) -> Iterator[Difference]:
    """The settings by which the losses of runs, or their speeds, may not be comparable."""
    for section, name in _settings(runs):
        subject = "evaluations" if section == "data" and name in EVALUATION else "trainings"
        yield from _difference(runs, subject, name, [run.setting(section, name) for run in runs])
    yield from _difference(runs, "trainings", "tokens", [run.summary["tokens"] for run in runs])
    ranks = [run.setting("layout", "world_size") for run in runs]
    yield from _difference(runs, "speeds", "number of ranks", ranks)
    for name in runs[0].summary.get("versions") or {}:
        versions = [run.setting("versions", name) for run in runs]
        yield from _difference(runs, "versions", name, versions)


def _settings(runs: Sequence[Run]) -> Iterator[tuple[str, str]]:
    """Section and name of the settings that should be equal."""
    for section in ("data", "batch", "model", "tokenizer"):
        names = dict.fromkeys(name for run in runs for name in run.summary.get(section) or {})
        yield from ((section, name) for name in names if name not in NO_MATTER)


def _difference(
    runs: Sequence[Run], subject: str, name: str, values: Sequence[Any]
) -> Iterator[Difference]:
    """The difference of one setting, if there is one."""
    by_value: dict[str, list[str]] = {}
    for run, value in zip(runs, values, strict=True):
        by_value.setdefault(_shown(value), []).append(run.name)
    if len(by_value) > 1:
        yield Difference(subject=subject, name=name, values=by_value)


def _shown(value: Any) -> str:
    """A value in a sentence."""
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "none" if value is None else str(value)


def single_seeds(runs: Sequence[Run]) -> bool:
    """True if no two runs differ by their seed alone, so that the spread of seeds is unknown."""

    def without_seed(run: Run) -> str:
        names = ("router", "router_settings", "sffn", "balance", "optimizer", "model")
        return repr([run.summary.get(name) for name in names])

    return len({without_seed(run) for run in runs}) == len(runs)
