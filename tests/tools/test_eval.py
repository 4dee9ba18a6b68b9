"""The command: a table, JSON, a file, and one sentence for what cannot work."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.jobs import run_as_job
from tools import eval as tool


def run(load: Path, folder: Path, *flags: str, ranks: int = 1) -> Any:
    return run_as_job(ranks, lambda: tool.main(["--load", str(load), *flags]), folder=folder)


def test_results_are_a_table_json_and_a_file(trained, tmp_path: Path) -> None:
    load = trained("switch")
    (tmp_path / "a.txt").write_text("def f(x):\n    return x\n" * 9)
    (tmp_path / "b.jsonl").write_text('{"body": "import os"}\n')
    files = ("--data", "a.txt", "b.jsonl", "--json-key", "body")
    first, second = run(
        load,
        tmp_path,
        *files,
        "--json",
        "--output",
        "eval.json",
        "--expert-model-parallel-size",
        "2",
        ranks=2,
    )
    assert second.stdout == ""
    results = json.loads(first.stdout)
    assert json.loads((tmp_path / "eval.json").read_text()) == results
    assert results["load"] == str(load)
    assert (results["iteration"], results["context"], results["stride"]) == (2, 64, 64)
    assert [record["data"] for record in results["results"]] == ["a.txt", "b.jsonl"]
    (table,) = run(load, tmp_path, *files)
    head, *rows = table.stdout.splitlines()
    assert head.split("  ")[0] == "data"
    for row, record in zip(rows, results["results"], strict=True):
        name, documents, tokens, loss, *_ = row.split()
        assert (name, int(documents), int(tokens)) == (record["data"], 1, record["tokens"])
        assert float(loss) == pytest.approx(record["loss"], abs=1e-4)


def test_what_cannot_work_is_one_sentence(trained, tmp_path: Path) -> None:
    load = trained("switch")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "a.txt").write_text("x")
    for flags, sentence in (
        (("--data", "a.txt", "--stride", "65"), "--stride 65 is not between 1 and the context"),
        (("--data", "none.txt"), "--data none.txt does not exist; give a file"),
        (("--data", "empty.txt"), "--data empty.txt has no token to score; give some text"),
        (("--data", "a.txt", "--limit", "0"), "--limit 0 must be at least 1"),
        ((), "there is nothing to evaluate; give --data FILE, or --tasks TASK"),
    ):
        with pytest.raises(AssertionError) as error:
            run(load, tmp_path, *flags)
        assert f"RuntimeError: ConfigError: {sentence}" in str(error.value)


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm_eval is installed")
def test_tasks_without_lm_eval_name_the_extra(trained, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"--tasks needs lm_eval, which is not installed; pip"):
        run(trained("switch"), tmp_path, "--tasks", "mine")
