"""The results that a report reads: of a study, of single runs, and of both."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_sffn.study.reporting.conclusions import conclude
from megatron_sffn.study.reporting.findings import find
from megatron_sffn.study.reporting.results import read_results
from megatron_sffn.study.reporting.tables import tables
from tests.support import studies


def told(*folders: object) -> str:
    """What a report begins with."""
    findings = find(read_results([Path(str(folder)) for folder in folders]))
    return "\n".join(conclude(findings).lines(most=100))


def test_parquet_and_csv_give_the_same_results(tmp_path: Path) -> None:
    kinds = ("csv", "parquet")
    folders = [studies.write(tmp_path / kind, studies.rows(widths=[128]), kind) for kind in kinds]
    from_csv, from_parquet = (read_results([folder]) for folder in folders)
    assert from_csv.rows == from_parquet.rows
    assert from_csv.losses.equals(from_parquet.losses)


def test_runs_that_no_sweep_started_are_named_by_their_numbers(tmp_path: Path) -> None:
    folders = [
        _run(tmp_path / "dense", None, 3.0, 1),
        _run(tmp_path / "a", 32, 2.5, 1),
        _run(tmp_path / "b", 32, 2.6, 2),
        _run(tmp_path / "c", 32, 2.7, 1, balance={"moe_aux_loss_coeff": 0.01}),
    ]
    (tmp_path / "unfinished").mkdir()
    folders.append(str(tmp_path / "unfinished"))
    out = told(*folders)
    assert "avg-k-g32-E16-d64-l2 is 0.4500 nats below dense-d64-l2." in out
    assert "avg-k-g32-E16-d64-l2 (2) is 0.3000 nats below dense-d64-l2." in out
    assert f"{tmp_path}/unfinished is left out: it has no summary.json." in out
    assert "A second seed, so that the spread is unknown: dense-d64-l2" in out


def test_the_summary_of_a_real_run_has_all_that_a_report_reads(
    trained: Callable[[str], Path],
) -> None:
    results = read_results([trained("avg-k")])
    (row,) = results.rows
    known = ("router", "block_size", "lr", "hidden_size", "tokens", "training_flops", "seconds")
    assert all(row[name] for name in known), row
    assert len(results.losses) and "1 run of 1 setting and 1 size" in told(trained("avg-k"))


def _run(folder: Path, block_size: int | None, loss: float, seed: int, **changes: Any) -> str:
    """The folder of a finished run with the summary that a run leaves."""
    summary = {
        "router": "avg-k" if block_size else "dense",
        "block_size": block_size,
        "expansion": 16 if block_size else None,
        "seed": seed,
        "iterations": 10,
        "tokens": 1000,
        "validation_loss": loss,
        "validation_curve": [[5, loss + 1], [10, loss]],
        "flops_per_token": 1e6,
        "tokens_per_second": 10.0,
        "parameters_total": 1e6,
        "parameters_active": 1e5,
        "model": {"hidden_size": 64, "num_layers": 2},
        "optimizer": {"lr": 1e-3, "min_lr": 1e-4},
        **changes,
    }
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps(summary))
    return str(folder)


def test_a_study_and_single_runs_together_are_told(tmp_path: Path) -> None:
    studies.write(tmp_path / "study", studies.rows(widths=[128], rates=[1e-3]))
    run = _run(tmp_path / "dense", None, 3.0, 1)
    out = told(tmp_path / "study", run)
    assert "The results are from several places" in out
    assert "A ladder of 3 learning rates" in out


def test_runs_without_a_loss_and_repeated_seeds_are_left_out_and_named(tmp_path: Path) -> None:
    rows = studies.rows(widths=[128], rates=[1e-3])
    rows[0] |= {"run": "diverged", "validation_loss": float("nan")}
    rows.append({**rows[5], "run": "again"})
    folder = studies.write(tmp_path / "study", rows)
    (folder / "half").mkdir()
    (folder / "half" / "validation.jsonl").write_text("")
    out = told(folder)
    assert "Without a finite validation loss, left out: diverged." in out
    assert f"again, left out: {rows[5]['run']}." in out
    assert "Begun and not finished: half." in out


def test_several_validation_sets_have_a_table(tmp_path: Path) -> None:
    rows = studies.rows(widths=[128], rates=[1e-3], spread=0.0)
    for row in rows:
        row |= {"loss.code": 1.25, "bits_per_byte.code": 0.5, "loss.prose": 2.0}
    (table,) = (
        table
        for table in tables(find(read_results([studies.write(tmp_path, rows)])))
        if table.name == "validation_sets"
    )
    assert table.headings == ("setting", "code", "prose")
    assert table.rows[0] == ("avg-k-g32-d128", "1.2500 (0.5000)", "2.0000")


def test_losses_of_single_sets_and_versions_are_no_flags_that_a_study_varies(
    tmp_path: Path,
) -> None:
    rows = studies.rows(widths=[128], rates=[1e-3])
    plain = read_results([Path(studies.write(tmp_path / "plain", rows))]).flags
    more = [{**row, "loss.code": index, "version.torch": "2"} for index, row in enumerate(rows)]
    assert read_results([Path(studies.write(tmp_path / "more", more))]).flags == plain
