"""The finished runs of a study: one row for each run, and the losses over time.

Inputs: the folder of a study (`results.parquet` or `results.csv`, and `losses.*`), or folders of
single runs. Outputs: `Results`.

Design notes: a missing value is None in every row, so that readers need one test. The loss of a run
is the mean of its last evaluations where every run has it, else the last evaluation; never some of
both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas

from megatron_sffn.study.compare import differences
from megatron_sffn.study.runs import SUMMARY, Run, read_runs
from megatron_sffn.utils.errors import ConfigError

COLUMNS = (
    *("run", "point", "router", "block_size", "expansion", "active_cells", "num_blocks"),
    *(
        "num_active_blocks",
        "seed",
        "lr",
        "rate_source",
        "hidden_size",
        "num_layers",
        "iterations",
        "tokens",
    ),
    *("validation_loss", "validation_loss_tail", "training_loss_tail", "validation_perplexity"),
    *("bits_per_byte", "parameters_total", "parameters_active", "flops_per_token"),
    *("training_flops", "tokens_per_second", "seconds", "peak_memory_bytes", "load_entropy"),
    *("dead_blocks", "sent_bytes_per_token", "commit"),
)
"""Columns of the results that every study may have. A column with a dot is of one validation set or
of one package; any other column is a flag that the study varies."""
NEEDED = ("run", "point", "router", "seed", "lr", "validation_loss")
LOSS_COLUMNS = ["run", "set", "iteration", "tokens", "loss"]
TRAINING_OVER_FORWARD = 3
"""FLOPs of forward and backward pass over those of the forward pass."""
TRACES = ("latest_checkpointed_iteration.txt", "validation.jsonl", "routing.jsonl")
"""Files by which the folder of an unfinished run is known."""


@dataclass(frozen=True, kw_only=True)
class Results:
    """The finished runs of a study.

    Args:
        rows: a dict for each run that has a loss, with `COLUMNS`, flags, and `loss`: the loss that
            is compared, in nats per token.
        flags: names of the columns with flags that the study varies.
        losses: frame with `LOSS_COLUMNS`; it may be empty.
        remarks: sentences on what was left out or mixed.
    """

    rows: tuple[dict[str, Any], ...]
    flags: tuple[str, ...]
    losses: Any
    remarks: tuple[str, ...]


def read_results(folders: Sequence[Path]) -> Results:
    """The finished runs in the folders of studies and of single runs.

    Raises:
        ConfigError: if a folder does not exist or has no results, a column is missing, or no run
            has a loss.
    """
    studies = [folder for folder in folders if _table(folder, "results") is not None]
    single = [folder for folder in folders if folder not in studies]
    rows: list[dict[str, Any]] = []
    losses, remarks = [], []
    for folder in studies:
        rows += _rows(folder)
        losses.append(_losses(folder))
        remarks += _unfinished(folder, {str(row["run"]) for row in rows})
    if single:
        runs, unfinished = _read_single(single)
        rows += _rows_of_runs(runs)
        losses.append(_losses_of_runs(runs))
        remarks += [f"{folder} is left out: it has no {SUMMARY}." for folder in unfinished]
        remarks += [f"Compare with care: {difference}." for difference in differences(runs)]
    if len(studies) + bool(single) > 1:
        remarks.insert(0, "The results are from several places; each has its own plan and machine.")
    rows, more = _with_loss(_distinct(rows, remarks))
    frame = pandas.concat([*losses, pandas.DataFrame(columns=LOSS_COLUMNS)], ignore_index=True)
    names = dict.fromkeys(name for row in rows for name in row)
    return Results(
        rows=tuple(rows),
        flags=tuple(name for name in names if name not in (*COLUMNS, "loss") and "." not in name),
        losses=frame,
        remarks=(*remarks, *more),
    )


def _table(folder: Path, name: str) -> Path | None:
    """The file of a table in the folder of a study: Parquet, which keeps types, or CSV."""
    files = (folder / f"{name}{end}" for end in (".parquet", ".csv"))
    return next((file for file in files if file.is_file()), None)


def _read_frame(path: Path) -> Any:
    try:
        return pandas.read_parquet(path) if path.suffix == ".parquet" else pandas.read_csv(path)
    except (ValueError, OSError) as error:  # pandas' and pyarrow's own errors are ValueErrors
        raise ConfigError(
            f"{path} cannot be read ({error}); run the sweep again, which writes it anew"
        ) from error


def _rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of a study's results."""
    path = _table(folder, "results")
    assert path is not None, folder
    frame = _read_frame(path)
    for name in NEEDED:
        if name not in frame.columns:
            raise ConfigError(f"{path} has no column {name!r}; let the sweep write it again")
    if not len(frame):
        raise ConfigError(f"{path} has no finished run; wait for the first run of the sweep to end")
    rows: list[dict[str, Any]] = frame.to_dict("records")
    empty = dict.fromkeys(COLUMNS)
    return [{**empty, **{name: _plain(value) for name, value in row.items()}} for row in rows]


def _plain(value: Any) -> Any:
    """A value of a frame as Python's own; None if it is missing."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list):
        return " ".join(map(str, value))
    return None if pandas.isna(value) else value


def _losses(folder: Path) -> Any:
    """The losses over time of a study; empty if it has none."""
    path = _table(folder, "losses")
    if path is None:
        return pandas.DataFrame(columns=LOSS_COLUMNS)
    frame = _read_frame(path)
    for name in LOSS_COLUMNS:
        if name not in frame.columns:
            raise ConfigError(f"{path} has no column {name!r}; let the sweep write it again")
    return frame[LOSS_COLUMNS]


def _unfinished(study: Path, finished: set[str]) -> list[str]:
    """A sentence on the runs in the folder of a study that have begun and left no summary."""
    begun = {trace.parent for name in TRACES for trace in study.glob(f"**/{name}")}
    names = sorted(
        folder.name
        for folder in begun
        if not (folder / SUMMARY).is_file() and folder.name not in finished
    )
    return [f"Begun and not finished: {', '.join(names)}."] if names else []


def _read_single(folders: Sequence[Path]) -> tuple[list[Run], list[Path]]:
    """The runs in some folders.

    Raises:
        ConfigError: if none is the folder of a study or of a finished run.
    """
    try:
        return read_runs(folders)
    except ConfigError as error:
        if len(folders) == 1 and folders[0].is_dir() and not (folders[0] / SUMMARY).is_file():
            raise ConfigError(
                f"{folders[0]} has neither results.parquet nor results.csv nor {SUMMARY}; give the "
                "folder of a study, as megatron-sffn sweep leaves it, or folders of finished runs"
            ) from error
        raise


def _rows_of_runs(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Rows of single runs; a point is what they have in common but seed and learning rate."""
    settings_of_label: dict[str, list[str]] = {}
    rows = []
    for run in runs:
        row = {**dict.fromkeys(COLUMNS), **run.columns(), "run": run.name}
        row["router"] = row["router"] or "dense"
        if row["tokens"] and row["flops_per_token"]:
            row["training_flops"] = TRAINING_OVER_FORWARD * row["flops_per_token"] * row["tokens"]
        label = _label(row)
        settings = settings_of_label.setdefault(label, [])
        if (setting := _setting(run)) not in settings:
            settings.append(setting)
        number = settings.index(setting) + 1
        rows.append({**row, "point": label if number == 1 else f"{label} ({number})"})
    return rows


def _label(row: dict[str, Any]) -> str:
    """The name of a setting from its numbers."""
    letters = {"block_size": "g", "expansion": "E", "hidden_size": "d", "num_layers": "l"}
    numbers = [f"{letter}{row[name]}" for name, letter in letters.items() if row[name] is not None]
    return "-".join([row["router"], *numbers])


def _setting(run: Run) -> str:
    """Everything in a summary that makes a setting, but seed and learning rate."""
    names = ("active_cells", "router_settings", "sffn", "balance", "model", "batch", "tokens")
    optimizer = {
        name: value
        for name, value in (run.summary.get("optimizer") or {}).items()
        if name not in ("lr", "min_lr")
    }
    return repr([optimizer, *(run.summary.get(name) for name in names)])


def _losses_of_runs(runs: Sequence[Run]) -> Any:
    """The validation losses of single runs over time."""
    lines = []
    for run in runs:
        tokens = run.summary["tokens"] / max(run.summary["iterations"], 1)
        for step, loss in run.summary.get("validation_curve") or []:
            lines.append((run.name, "validation", step, tokens * step, loss))
    return pandas.DataFrame(lines, columns=LOSS_COLUMNS)


def _distinct(rows: list[dict[str, Any]], remarks: list[str]) -> list[dict[str, Any]]:
    """The rows without repetitions of one seed, of which the last stays."""
    kept: dict[tuple[Any, ...], dict[str, Any]] = {}
    repeated = []
    for row in rows:
        names = ("point", "seed", "lr", "rate_source", "hidden_size", "num_layers", "tokens")
        key = tuple(row[name] for name in names)
        if key in kept:
            repeated.append(str(kept[key]["run"]))
        kept[key] = row
    if repeated:
        remarks.append(
            f"The same setting, seed and learning rate again, left out: {', '.join(repeated)}."
        )
    return list(kept.values())


def _with_loss(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows that have a loss, with it, and sentences on the others."""

    def is_loss(value: Any) -> bool:
        return value is not None and math.isfinite(value)

    finite = [row for row in rows if is_loss(row["validation_loss"])]
    if not finite:
        raise ConfigError(
            f"none of the {len(rows)} runs has a finite validation loss; train with "
            "--eval-interval and at a smaller learning rate"
        )
    has_tail = all(is_loss(row["validation_loss_tail"]) for row in finite)
    remarks = []
    if not has_tail:
        remarks.append(
            "Losses are those of the last evaluation: not every run has a mean of several."
        )
    lost = [str(row["run"]) for row in rows if row not in finite]
    if lost:
        remarks.append(f"Without a finite validation loss, left out: {', '.join(lost)}.")
    column = "validation_loss_tail" if has_tail else "validation_loss"
    return [{**row, "loss": float(row[column])} for row in finite], remarks
