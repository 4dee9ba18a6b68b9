"""The results of a study as tables.

Inputs: the folders of a study's runs. Outputs: `results.csv` and `results.parquet` with a row for
each finished run, `losses.csv` and `losses.parquet` with a row for each loss of these runs.

Design notes: the tables are made anew from the runs' own files whenever a run ends, so that a kill
loses nothing. Training losses come from TensorBoard's events, where the later of two equal steps
counts: a resumed run repeats the steps after its checkpoint.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow
import pyarrow.csv
import pyarrow.parquet

from megatron_sffn.study.running.foresee import Forecast
from megatron_sffn.study.running.text_bytes import bits_per_byte, validation_prefixes
from megatron_sffn.study.runs import SUMMARY, TENSORBOARD, Run
from megatron_sffn.study.scalars import read_scalars
from megatron_sffn.train.routing_metrics import EVALUATION
from megatron_sffn.utils.atomic_files import atomic_path, read_json_object, read_records

TAIL = 0.1
"""Share of the steps, the last ones, whose mean loss is the tail average."""
IN_OTHER_COLUMNS = (
    "sffn-router",
    "sffn-block-size",
    "sffn-expansion",
    "sffn-active-cells",
    "ffn-hidden-size",
    "hidden-size",
    "num-layers",
    "seed",
    "lr",
)
"""Flags whose values other columns have."""


def write_tables(folder: Path, forecasts: Sequence[Forecast], runs: Mapping[str, Path]) -> int:
    """Write the tables of a study; returns the number of finished runs.

    Args:
        folder: of the study.
        forecasts: of all runs.
        runs: name of a run -> its folder.
    """
    results, losses = [], []
    for forecast in forecasts:
        run_folder = runs[forecast.run.name]
        summary = read_json_object(run_folder / SUMMARY)
        if summary:
            run_losses = list(_losses(forecast.run.name, run_folder, summary, forecast))
            results.append(_row(forecast, run_folder, summary, run_losses))
            losses += run_losses
    if results:
        _write(folder / "results", results)
        _write(folder / "losses", losses)
    return len(results)


def _row(
    forecast: Forecast,
    folder: Path,
    summary: dict[str, Any],
    losses: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The row of a finished run."""
    run = forecast.run
    versions = {f"version.{name}": value for name, value in summary.get("versions", {}).items()}
    return {
        "run": run.name,
        "point": run.point,
        **Run(name=run.name, summary=summary).columns(),
        "rate_source": run.rate_source,
        "training_flops": forecast.flops,
        "training_loss_tail": _tail(losses, "training", summary["iterations"]),
        "validation_loss_tail": _tail(losses, "validation", summary["iterations"]),
        **_balance(folder),
        **_of_sets(summary, forecast.args),
        **versions,
        **{
            flag.replace("-", "_"): None if value is None else str(value)
            for flag, value in run.settings.items()
            if flag not in IN_OTHER_COLUMNS
        },
    }


def _tail(losses: Sequence[Mapping[str, Any]], kind: str, iterations: int) -> float | None:
    """The mean loss of the last steps, or the last loss if there is none among them."""
    of_kind = [loss for loss in losses if loss["set"] == kind]
    last = [loss for loss in of_kind if loss["iteration"] > (1 - TAIL) * iterations]
    return fmean(loss["loss"] for loss in last or of_kind[-1:]) if of_kind else None


def _of_sets(summary: Mapping[str, Any], args: Namespace) -> dict[str, float | None]:
    """Bits per byte, and loss, perplexity and bits per byte of each set if there are several."""
    prefixes, mean = validation_prefixes(args), summary.get("validation_loss")
    sets = summary.get("validation_losses") or {}
    if len(prefixes) == 1 and mean is not None:
        return {"bits_per_byte": bits_per_byte(mean, prefixes[0], args)}
    columns: dict[str, float | None] = {}
    if len(sets) == len(prefixes):
        for (name, loss), prefix in zip(sets.items(), prefixes, strict=True):
            columns[f"loss.{name}"] = loss
            columns[f"perplexity.{name}"] = math.exp(min(loss, 700))
            columns[f"bits_per_byte.{name}"] = bits_per_byte(loss, prefix, args)
    return columns


def _balance(folder: Path) -> dict[str, float | None]:
    """Balance of the last evaluation, as a mean over the sparse layers."""
    records = [
        record
        for record in read_records(folder / "routing.jsonl")
        if record.get("phase") == EVALUATION
    ]
    last = max((record["iteration"] for record in records), default=None)
    layers = [record for record in records if record["iteration"] == last]
    return {
        "load_entropy": fmean(layer["load_entropy"] for layer in layers) if layers else None,
        "dead_blocks": fmean(layer["dead_share"] for layer in layers) if layers else None,
    }


def _losses(
    name: str, folder: Path, summary: Mapping[str, Any], forecast: Forecast
) -> Iterable[dict[str, Any]]:
    """The losses of a run over its steps."""
    per_step = forecast.tokens / forecast.train_iters

    def record(kind: str, iteration: int, loss: float) -> dict[str, Any]:
        tokens = round(iteration * per_step)
        return {"run": name, "set": kind, "iteration": iteration, "tokens": tokens, "loss": loss}

    written_at = (folder / SUMMARY).stat().st_mtime_ns
    for iteration, loss in _training_losses(folder / TENSORBOARD, written_at).items():
        yield record("training", iteration, loss)
    for iteration, loss in summary.get("validation_curve") or []:
        yield record("validation", iteration, loss)


@cache
def _training_losses(events: Path, written_at: int) -> dict[int, float]:
    """Step -> training loss, from TensorBoard's events, read once per run.

    Args:
        events: folder of the events.
        written_at: time of the run's summary, so that a run that is trained anew is read anew.
    """
    return read_scalars(events).get("lm loss", {})


def _write(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write records as CSV and as Parquet; a record without a column has no value there."""
    names = dict.fromkeys(name for record in records for name in record)
    table = pyarrow.table({name: [record.get(name) for record in records] for name in names})
    with atomic_path(path.with_suffix(".csv")) as file:
        pyarrow.csv.write_csv(table, file)
    with atomic_path(path.with_suffix(".parquet")) as file:
        pyarrow.parquet.write_table(table, file)
