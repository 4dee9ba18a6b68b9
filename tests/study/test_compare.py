"""Finished runs side by side, and what makes them incomparable."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_sffn.utils.errors import ConfigError
from tools.compare import main

Save = Callable[..., str]


@pytest.fixture
def save(trained: Callable[[str], Path], tmp_path: Path) -> Save:
    """`save(name, loss, section={setting: value})` is the folder of a real run, changed so."""
    summary = json.loads((trained("avg-k") / "summary.json").read_text())

    def write(name: str, loss: float | None, **changes: Any) -> str:
        changed = {**summary, "validation_loss": loss}
        for key, value in changes.items():
            changed[key] = {**summary[key], **value} if isinstance(value, dict) else value
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "summary.json").write_text(json.dumps(changed))
        return str(tmp_path / name)

    return write


def test_the_best_run_is_first_and_seeds_of_one_setting_give_no_warning(
    save: Save, capsys: pytest.CaptureFixture[str]
) -> None:
    main([save("a", 2.5), save("b", 2.0, seed=7), save("c", None, seed=8)])
    heading, *rows = capsys.readouterr().out.splitlines()
    assert heading.split()[:4] == ["run", "router", "g", "E"]
    assert [row.split()[0] for row in rows] == ["b", "a", "c"]
    assert " 2.0000 " in rows[0] and " avg-k " in rows[0]


def test_every_difference_that_matters_is_a_warning(
    save: Save, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    other = save(
        "y/run",
        2.0,
        tokens=7,
        data={"train_data_path": ["other"], "eval_interval": 99, "sffn_eval_iters": 3},
        model={"hidden_size": 8},
        layout={"world_size": 64},
        versions={"torch": "1.0"},
    )
    (tmp_path / "half").mkdir()
    main([save("x/run", 2.5), other, str(tmp_path / "half")])
    lines = capsys.readouterr().out.splitlines()
    warnings = [line.removeprefix("warning: ") for line in lines if line.startswith("warning: ")]
    beginnings = [
        "trainings differ by train_data_path: none in x/run; other in y/run",
        "evaluations differ by sffn_eval_iters",
        "trainings differ by hidden_size",
        "trainings differ by tokens",
        "speeds differ by number of ranks: 1 in x/run; 64 in y/run",
        "versions differ by torch",
        f"{tmp_path}/half has no summary.json and is left out: unfinished",
        "no setting was trained with two seeds",
    ]
    assert len(warnings) == len(beginnings), warnings
    for warning, beginning in zip(warnings, beginnings, strict=True):
        assert warning.startswith(beginning), warning


def test_the_json_has_whole_summaries(save: Save, capsys: pytest.CaptureFixture[str]) -> None:
    main([save("a", 2.5), "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["runs"]["a"]["validation_loss"] == 2.5
    assert printed["warnings"] == []


def test_what_cannot_be_compared_is_refused_in_a_sentence(save: Save, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none is no folder; give the folder of a run"):
        main([str(tmp_path / "none")])
    with pytest.raises(ConfigError, match=r"none of the 1 folders has a summary\.json"):
        main([str(tmp_path)])
    folder = save("a", 1.0)
    (Path(folder) / "summary.json").write_text("{")
    with pytest.raises(ConfigError, match=r"a/summary\.json is no JSON .*; write it again"):
        main([folder])
