"""A sweep of real runs: killed and resumed, it gives the table of an undisturbed one."""

from __future__ import annotations

import csv
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from megatron_sffn.study.running.foresee import Forecast, valid_forecasts
from megatron_sffn.study.running.ladder import best_rate, fitted_rate
from megatron_sffn.study.running.one_run import RunState, is_finished, run_folder, state_of
from megatron_sffn.study.running.study_file import Study, read_study
from megatron_sffn.study.running.sweep import Sweep
from megatron_sffn.utils.errors import ConfigError
from tests.study.conftest import WriteStudy
from tests.support.processes import kill_all, wait_until
from tools import sweep

# Of Python 3.13's argparse, for a flag of Megatron's.
pytestmark = pytest.mark.filterwarnings("ignore:'type' is deprecated:DeprecationWarning")

STEPS = 60
FLAGS = f"--train-iters {STEPS} --eval-interval 20 --save-interval 10"
POINTS = [{"sffn-router": ["dense", "avg-k"]}]
MEASURED = ("tokens_per_second", "seconds", "peak_memory_bytes")
"""Columns that differ from run to run."""


def table(folder: Path, name: str) -> list[dict[str, str]]:
    """The rows of a table of results, without what was measured."""
    with (folder / name).open() as file:
        rows = list(csv.DictReader(file))
    return [{key: row[key] for key in row if key not in MEASURED} for row in rows]


@contextmanager
def started(path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A sweep in a process of its own, with its output beside the study's file."""
    command = [sys.executable, "-m", "tools.sweep", str(path)]
    with path.with_suffix(".log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield process
    finally:
        kill_all(process)


def wait_for_step(study: Study, forecast: Forecast, step: int, path: Path) -> None:
    """Wait until a run has trained some steps."""
    wait_until(
        lambda: state_of(study, forecast).status.iteration >= step,
        300,
        lambda: path.with_suffix(".log").read_text(),
    )


def test_a_sweep_killed_twice_gives_the_table_of_an_undisturbed_one(
    write_study: WriteStudy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    undisturbed = write_study(POINTS, flags=FLAGS, file="undisturbed.yaml", parallel=2)
    assert sweep.main([str(undisturbed), "run"]) == 0
    results = tmp_path / "results"
    expected = {name: table(results, name) for name in ("results.csv", "losses.csv")}
    assert [row["router"] for row in expected["results.csv"]] == ["dense", "avg-k"]
    assert len(expected["losses.csv"]) == 2 * (STEPS + STEPS // 20)

    path = write_study(POINTS, flags=FLAGS, folder=str(tmp_path / "killed"), parallel=1)
    study = read_study(path)
    dense, avg_k = valid_forecasts(study)
    with started(path) as process:
        wait_for_step(study, dense, 12, path)
        kill_all(process)
    # The lock is free when the last killed process has gone.
    wait_until(lambda: state_of(study, dense).name != "running", 100, str)
    assert not is_finished(run_folder(study, dense), dense)
    with started(path) as process:
        wait_for_step(study, avg_k, 12, path)
        with pytest.raises(ConfigError, match="in use by another sweep"):
            sweep.main([str(path), "run"])
        assert state_of(study, avg_k).name in ("running", "finished")
        assert sweep.main([str(path), "stop"]) == 0
        assert process.wait(300) in (0, sweep.INTERRUPTED)
    assert sweep.main([str(path), "stop"]) == 1
    capsys.readouterr()
    assert sweep.main([str(path), "run"]) == 0
    assert "2 of 2 runs have finished" in capsys.readouterr().out
    assert {name: table(tmp_path / "killed", name) for name in expected} == expected
    assert sweep.main([str(path), "status"]) == 0
    assert "2 finished; 0:00:00 left" in capsys.readouterr().out


def test_a_run_that_outlives_its_sweep_is_waited_for_and_not_started_twice(
    write_study: WriteStudy,
) -> None:
    path = write_study([{"sffn-router": "dense"}], flags=FLAGS)
    study = read_study(path)
    (forecast,) = valid_forecasts(study)
    with started(path) as process:
        wait_for_step(study, forecast, 1, path)
        runs = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert any(run.is_running() for run in runs)
        assert state_of(study, forecast).name in ("running", "finished")
        assert Sweep(study, [forecast]).run() == []
    log = (run_folder(study, forecast) / "train.log").read_text()
    assert log.count("[after training is done]") == 1
    assert state_of(study, forecast) == RunState(
        name="finished", status=state_of(study, forecast).status
    )


def test_a_failed_run_and_those_that_need_its_loss_are_named_and_tried_again(
    write_study: WriteStudy, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {"ladder": {"seed": 1, "lr": [3e-3, 6e-3]}, "each": {"seed": 2, "lr": "fitted"}}
    path = write_study([{"sffn-router": "dense"}], flags="--train-iters 2", parallel=2, **keys)
    first, second, fitted = valid_forecasts(study := read_study(path))
    damaged = run_folder(study, first) / "latest_checkpointed_iteration.txt"
    damaged.parent.mkdir(parents=True)
    damaged.write_text("no number")
    assert sweep.main([str(path), "run"]) == 1
    printed = capsys.readouterr()
    assert f"error: {first.run.name} failed; see " in printed.err
    assert f"error: {fitted.run.name} failed; see " in printed.err
    assert "1 of 3 runs have finished" in printed.out
    states = {run.run.name: state_of(study, run) for run in (first, second, fitted)}
    assert [state.name for state in states.values()] == ["failed", "finished", "failed"]
    assert "a run of its ladder has failed" in states[fitted.run.name].reason
    assert sweep.main([str(path), "status"]) == 0
    assert f"{first.run.name} failed: " in capsys.readouterr().out
    damaged.unlink()
    assert sweep.main([str(path), "run"]) == 0
    changed = write_study([{"sffn-router": "dense"}], flags="--train-iters 3", **keys)
    with pytest.raises(ConfigError, match=r"was trained with other flags \(train-iters 2\)"):
        sweep.main([str(changed), "run"])


def test_seeds_train_at_the_rate_that_the_ladder_of_their_point_gives(
    write_study: WriteStudy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_study(
        [{"sffn-router": "dense"}],
        flags="--train-iters 12",
        ladder={"seed": 1, "lr": [3e-4, 1e-2]},
        ladder_steps=0.5,
        ladder_extra=2,
        each={"seed": [2], "lr": "fitted"},
        parallel=2,
    )
    assert sweep.main([str(path), "dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "3 runs, 0 of which cannot start" in printed and "and up to 2 more, of " in printed
    assert sweep.main([str(path), "run"]) == 0
    assert "4 of 4 runs have finished" in capsys.readouterr().out
    assert sweep.main([str(path), "status"]) == 0
    assert "4 finished; 0:00:00 left" in capsys.readouterr().out
    rows = table(tmp_path / "results", "results.csv")
    losses = {float(row["lr"]): float(row["validation_loss"]) for row in rows[:3]}
    assert list(losses) == [3e-4, 1e-2, 0.33], "one rate beyond the edge, where the best one was"
    assert best_rate(losses) == 1e-2
    assert rows[3]["run"] == "dense-seed2-lrfitted"
    assert [row["iterations"] for row in rows] == ["6"] * 3 + ["12"]
    expected = fitted_rate(losses) * 2**-0.2813  # twice the tokens
    assert float(rows[3]["lr"]) == pytest.approx(expected, rel=0.01) != 1e-2
    assert [row["rate_source"] for row in rows] == ["ladder"] * 3 + ["fitted"]

    # A ladder that goes on gives other rates than those of the runs that have finished.
    (rung,) = (tmp_path / "results" / "runs").glob("*lr0.33")
    summary = rung / "summary.json"
    summary.write_text(re.sub(r'("validation_loss": )[\d.]+', r"\g<1>0.5", summary.read_text()))
    with pytest.raises(ConfigError, match=r"dense-seed2-lrfitted was trained with other flags"):
        sweep.main([str(path), "run"])
    assert (rung.parent / "dense-seed1-lr11").is_dir()


def test_a_run_that_the_study_of_the_rates_has_trained_is_taken_over(
    write_study: WriteStudy, tmp_path: Path
) -> None:
    points, flags = [{"sffn-router": "dense"}], "--train-iters 3 --eval-interval 3"
    first = write_study(points, flags=flags, each={"lr": [1e-2], "seed": 1})
    assert sweep.main([str(first), "run"]) == 0
    second = write_study(
        points,
        file="second.yaml",
        flags=flags,
        folder=str(tmp_path / "second"),
        transfer=str(tmp_path / "results"),
        each={"seed": [1, 2], "lr": "transferred"},
    )
    assert sweep.main([str(second), "run"]) == 0
    runs = sorted((tmp_path / "second" / "runs").iterdir())
    assert [run.is_symlink() for run in runs] == [True, False]
    (trained,) = table(tmp_path / "results", "results.csv")
    rows = table(tmp_path / "second", "results.csv")
    assert [row["rate_source"] for row in rows] == ["transferred"] * 2
    assert rows[0]["validation_loss"] == trained["validation_loss"] != rows[1]["validation_loss"]
    shutil.rmtree(runs[0].resolve())
    assert sweep.main([str(second), "run"]) == 0
    assert not runs[0].is_symlink() and table(tmp_path / "second", "results.csv") == rows


def test_a_fitted_rate_is_the_bottom_of_the_valley_or_its_edge() -> None:
    valley = {rate: math.log(rate / 2e-3) ** 2 for rate in (1e-3, 2.5e-3, 5e-3, 1e-2)}
    assert fitted_rate(valley) == pytest.approx(2e-3)
    assert fitted_rate({1e-3: 3.0, 2e-3: 2.0, 4e-3: 1.0}) == 4e-3
    assert fitted_rate({1e-3: 3.0, 2e-3: 2.0, 4e-3: math.nan}) == 2e-3
    assert fitted_rate({1e-3: math.nan}) == 1e-3
