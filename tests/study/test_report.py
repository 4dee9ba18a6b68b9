"""A report of a study with known losses: its page, files, text and refusals."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path

import pytest

from megatron_sffn.scaling.surface_record import of_record
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
    for series, surface in printed["surfaces"].items():
        assert surface["router"] == series and surface["expansions"] == [16]
        assert of_record(surface).ranges["tokens"] == (20_000 * 128, 20_000 * 256)
    assert "published" in printed["baseline_law"]["source"]


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
