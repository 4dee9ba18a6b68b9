"""A report of a study with known losses: its page, files, text and refusals."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_sffn.study.conclusions import conclude
from megatron_sffn.study.findings import find
from megatron_sffn.study.results import read_results
from megatron_sffn.utils import errors
from megatron_sffn.utils.errors import ConfigError
from tests.support import studies
from tools.report import main

FIGURES = {
    *("loss_over_block_size", "fronts", "effective_speedup", "balance", "learning_rates"),
    *("training_curves", "scaling"),
}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    studies.write(folder, studies.rows())
    with (folder / "printed.json").open("w") as file, contextlib.redirect_stdout(file):
        main([str(folder), "--output", str(folder / "report"), "--json"])
    return folder / "report"


def told(*folders: object) -> str:
    """What a report begins with."""
    findings = find(read_results([Path(str(folder)) for folder in folders]))
    return "\n".join(conclude(findings).lines(most=100))


def test_the_page_holds_every_figure_and_no_link_to_elsewhere(report: Path) -> None:
    page = (report / "index.html").read_text()
    assert page.count("<svg role=") == len(FIGURES)
    for name in FIGURES:
        assert f'id="{name}"' in page
        assert (report / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (report / "figures" / f"{name}.svg").read_text().startswith("<?xml")
    assert not re.search(r"""(src|href)=["'](?!#)""", page)
    assert not re.search(r"url\((?!#)|@import|<script|<link", page)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_the_page_begins_with_what_holds_what_does_not_and_what_was_not_run(report: Path) -> None:
    page = (report / "index.html").read_text()
    headings = ("Orderings that hold", "Orderings that do not hold", "What was not run", "<svg")
    places = [page.index(heading) for heading in headings]
    assert places == sorted(places)
    assert "avg-k-g32-d128 is 0.1" in page[: places[1]]


def test_tables_are_in_markdown_and_latex(report: Path) -> None:
    for name in ("settings", "orderings", "learning_rates"):
        assert (report / "tables" / f"{name}.md").read_text().startswith("| ")
        assert r"\toprule" in (report / "tables" / f"{name}.tex").read_text()
    first = (report / "tables" / "settings.md").read_text().splitlines()[2]
    assert first.startswith("| avg-k-g32-d128 | avg-k | 32 | 16 | 128 | 0.001 | 3 | 3.3")


def test_json_has_the_findings_and_nothing_else(report: Path) -> None:
    printed = json.loads((report.parent / "printed.json").read_text())
    assert printed == json.loads((report / "report.json").read_text())
    speedup = {point["point"]: point["speedup_flops"] for point in printed["points"]}
    assert speedup["dense-d128"] == pytest.approx(1)
    assert speedup["avg-k-g32-d128"] > 1.5
    assert set(printed["surfaces"]) == set(studies.ROUTERS)
    assert "published" in printed["baseline_law"]["source"]


def test_parquet_and_csv_give_the_same_results(tmp_path: Path) -> None:
    kinds = ("csv", "parquet")
    folders = [studies.write(tmp_path / kind, studies.rows(widths=[128]), kind) for kind in kinds]
    from_csv, from_parquet = (read_results([folder]) for folder in folders)
    assert from_csv.rows == from_parquet.rows
    assert from_csv.losses.equals(from_parquet.losses)


def test_a_study_of_the_needed_columns_alone_has_the_figures_that_it_can(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    studies.write(tmp_path, studies.rows(widths=[128], columns=["run"]))
    main([str(tmp_path), "--output", str(tmp_path / "report")])
    names = {path.stem for path in (tmp_path / "report" / "figures").glob("*.svg")}
    assert names == {"loss_over_block_size", "learning_rates", "training_curves"}
    assert "Losses are those of the last evaluation" in capsys.readouterr().out


def test_names_are_escaped_on_the_page_and_in_latex(tmp_path: Path) -> None:
    rows = studies.rows(widths=[128], rates=[1e-3], seeds=[1, 2])
    for row in rows:
        row["point"] += "_a&b <100%>"
    studies.write(tmp_path, rows)
    main([str(tmp_path), "--output", str(tmp_path / "report")])
    latex = (tmp_path / "report" / "tables" / "settings.tex").read_text()
    assert r"avg-k-g32-d128\_a\&b <100\%>" in latex
    page = (tmp_path / "report" / "index.html").read_text()
    assert "_a&amp;b &lt;100%&gt;" in page and "<100%>" not in page


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


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "has neither results.parquet nor results.csv nor summary.json; give the folder"),
        ("run,point,router,seed,lr,validation_loss\n", "has no finished run"),
        ("run,point\na,b\n", "has no column 'router'"),
        ("", "cannot be read"),
        ("run,point,router,seed,lr,validation_loss\na,b,dense,1,1e-3,\n", "none of the 1 runs"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(
    tmp_path: Path, content: str | None, sentence: str
) -> None:
    if content is not None:
        (tmp_path / "results.csv").write_text(content)
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        main([str(tmp_path), "--output", str(tmp_path / "report")])
    assert not (tmp_path / "report").exists()


def test_a_missing_extra_and_a_missing_folder_are_refused_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="is no folder"):
        main([str(tmp_path / "nowhere"), "--output", str(tmp_path)])
    monkeypatch.setattr(errors.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"report needs pandas, .*megatron-sffn\[study\]"):
        main([str(tmp_path), "--output", str(tmp_path)])
