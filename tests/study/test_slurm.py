"""Studies on Slurm: jobs run in submitit's local executor, and sbatch files are read, not run."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

# At its import submitit closes all handlers of logging, and absl's then closes pytest's output if a
# test captures it. At the import of this file no test does.
import submitit  # noqa: F401

from megatron_sffn.study.running.foresee import valid_forecasts
from megatron_sffn.study.running.one_run import run_folder, state_of
from megatron_sffn.study.running.slurm import sbatch_parameters, submit_array, waiting_names
from megatron_sffn.study.running.slurm_job import RunJob
from megatron_sffn.study.running.study_file import read_study
from megatron_sffn.utils.atomic_files import read_json_object
from megatron_sffn.utils.errors import ConfigError
from tests.study.conftest import WriteStudy
from tests.study.test_sweep import STEPS, table
from tests.support.processes import HANGS, wait_until
from tools import sweep

# Of Python 3.13's argparse, for a flag of Megatron's.
pytestmark = pytest.mark.filterwarnings("ignore:'type' is deprecated:DeprecationWarning")

DENSE = [{"sffn-router": "dense"}]
LADDER = {
    "ladder": {"seed": 1, "lr": [3e-3, 1e-2]},
    "each": {"seed": 2, "lr": "fitted"},
    "parallel": 2,
    "slurm": {"time": 60},
}
TABLES = ("results.csv", "losses.csv")


def write_executable(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}")
    path.chmod(0o755)


def test_jobs_of_a_ladder_and_of_fitted_runs_give_the_tables_of_a_local_sweep(
    write_study: WriteStudy, tmp_path: Path
) -> None:
    local = write_study(DENSE, flags="--train-iters 3", file="local.yaml", **LADDER)
    assert sweep.main([str(local), "run"]) == 0
    path = write_study(DENSE, flags="--train-iters 3", folder=str(tmp_path / "jobs"), **LADDER)
    study = read_study(path)
    forecasts = valid_forecasts(study)
    ladder, fitted = waiting_names(study, forecasts)
    assert (len(ladder), fitted) == (2, ["dense-seed2-lrfitted"])

    with pytest.raises(ConfigError, match="a run of its ladder has not finished"):
        RunJob(study, fitted[0])()
    state = state_of(study, forecasts[-1])
    assert state.name == "failed" and "a run of its ladder has not finished" in state.reason

    for names in (ladder, fitted):
        for job in submit_array(study, names, cluster="local"):
            job.result()
    assert waiting_names(study, forecasts) == []
    assert sweep.main([str(path), "results"]) == 0
    for name in TABLES:
        assert table(tmp_path / "jobs", name) == table(tmp_path / "results", name)

    log = run_folder(study, forecasts[-1]) / "train.log"
    trained = log.read_bytes()
    RunJob(study, fitted[0])()
    assert log.read_bytes() == trained, "a job of a finished run trains nothing"


def test_runs_beyond_an_edge_are_submitted_after_those_whose_losses_they_need(
    write_study: WriteStudy,
) -> None:
    study = read_study(write_study(DENSE, flags="--train-iters 3", ladder_extra=2, **LADDER))
    given, first, second, fitted = waiting_names(study, forecasts := valid_forecasts(study))
    assert given == ["dense-seed1-lr0.003", "dense-seed1-lr0.01"]
    assert first == ["dense-seed1-lr0.0009", "dense-seed1-lr0.033"]
    assert second == ["dense-seed1-lr0.00027", "dense-seed1-lr0.11"]
    assert fitted == ["dense-seed2-lrfitted"]
    RunJob(study, first[0])()  # ends at once: the losses beside it are not known
    assert state_of(study, forecasts[2]).name == "waiting"


def test_a_run_that_is_warned_goes_on_in_the_requeued_job_and_after_a_stop_in_a_sweep(
    write_study: WriteStudy, tmp_path: Path
) -> None:
    flags = f"--train-iters {STEPS} --eval-interval 20 --save-interval 1000"
    path = write_study(DENSE, flags=flags, slurm={"time": 60})
    study = read_study(path)
    (forecast,) = valid_forecasts(study)
    log = run_folder(study, forecast) / "train.log"
    (job,) = submit_array(study, [forecast.run.name], cluster="local")

    def wait_for_step(step: int) -> None:
        def is_reached() -> bool:
            return state_of(study, forecast).status.iteration >= step

        wait_until(is_reached, HANGS, lambda: f"{job.stderr()}\n{log.exists() and log.read_text()}")

    def signal_job(number: int, *, is_sent_to_training: bool) -> None:
        (task,) = psutil.Process(int(job.job_id)).children()
        training = task.children(recursive=True) if is_sent_to_training else []
        for process in [*training, task]:
            process.send_signal(number)

    wait_for_step(2)
    assert state_of(study, forecast).name == "running"
    RunJob(study, forecast.run.name)()  # ends at once, because the run is running
    signal_job(signal.SIGUSR2, is_sent_to_training=True)
    wait_until(lambda: "Requeued job" in (job.stdout() or ""), HANGS, lambda: str(job.stderr()))
    first = int((log.parent / "latest_checkpointed_iteration.txt").read_text())
    assert 2 <= first < STEPS

    wait_for_step(first + 1)
    signal_job(signal.SIGINT, is_sent_to_training=False)
    job.result()
    second = int((log.parent / "latest_checkpointed_iteration.txt").read_text())
    assert first < second < STEPS and state_of(study, forecast).name == "waiting"

    assert sweep.main([str(path), "run"]) == 0
    assert (
        f"at iteration {first}" in log.read_text() and f"at iteration {second}" in log.read_text()
    )
    losses = table(tmp_path / "results", "losses.csv")
    assert len(losses) == STEPS + STEPS // 20
    assert [row["iterations"] for row in table(tmp_path / "results", "results.csv")] == [str(STEPS)]


def test_submit_writes_two_arrays_of_which_the_second_waits_and_stop_signals_both(
    write_study: WriteStudy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = tmp_path / "asked"
    number = f'echo "sbatch" >>{asked}; echo "Submitted batch job 7$(grep -c sbatch {asked})"'
    write_executable(tmp_path / "sbatch", number)
    write_executable(tmp_path / "scancel", f'echo "$@" >>{asked}')
    write_executable(tmp_path / "srun", "exit 9")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    slurm = {"partition": "gpu", "time": 240, "cpus-per-task": 8, "mem": "64GB", "account": "lab"}
    keys = {**LADDER, "each": {"seed": [2, 3, 4], "lr": "fitted"}, "ranks": 2, "slurm": slurm}
    path = write_study(DENSE, flags="--train-iters 3", **keys)
    assert sweep.main([str(path), "submit"]) == 0
    assert "job 71: 2 runs\njob 72: 3 runs\n" in capsys.readouterr().out

    folder = tmp_path / "results" / "slurm"
    ladder, fitted = ((folder / f"{id}_submission.sh").read_text() for id in (71, 72))
    expected = {
        *("--partition=gpu", "--time=240", "--cpus-per-task=8", "--mem=64GB", "--account=lab"),
        *("--gpus-per-node=2", "--nodes=1", "--ntasks-per-node=1", "--signal=USR2@180"),
        "--job-name=results",
    }
    for text in (ladder, fitted):
        assert expected <= {line.removeprefix("#SBATCH ") for line in text.splitlines()}
        assert f"{shlex.quote(sys.executable)} -u -m submitit.core._submit" in text
    assert "--array=0-1%2" in ladder and "--dependency" not in ladder
    assert "--array=0-2%2" in fitted and "--dependency=afterany:71\n" in fitted

    assert read_json_object(tmp_path / "results" / "slurm_jobs.json") == {"ids": ["71", "72"]}
    assert sweep.main([str(path), "stop"]) == 0
    assert "Slurm jobs 71, 72" in capsys.readouterr().out
    signals = [line for line in asked.read_text().splitlines() if line != "sbatch"]
    assert signals == ["--quiet --state=PENDING 71 72", "--quiet --signal=INT 71 72"]

    write_executable(tmp_path / "sbatch", "echo 'invalid partition: gpu' >&2; exit 1")
    with pytest.raises(ConfigError, match=r"sbatch has refused the jobs.*invalid partition: gpu"):
        sweep.main([str(path), "submit"])


@pytest.mark.parametrize(
    ("slurm", "sentence"),
    [
        ({"partion": "gpu"}, "partion of slurm in the study's file is unknown; did you mean parti"),
        ({"gpu-per-node": 8}, "did you mean gpus-per-node?"),
        ({"nodes": 2}, "nodes of slurm in the study's file is set for you: a run has one node"),
        ({"partition": "gpu"}, "time None of slurm in the study's file is no whole number of min"),
        ({"time": "4:00:00"}, "time 4:00:00 of slurm"),
    ],
)
def test_bad_parameters_of_slurm_are_refused_in_one_sentence(
    write_study: WriteStudy, slurm: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        sbatch_parameters(read_study(write_study(DENSE, slurm=slurm)))
    assert sentence in str(raised.value) and "\n" not in str(raised.value)


def test_gpus_are_the_ranks_unless_the_file_asks_for_others(write_study: WriteStudy) -> None:
    for slurm, gpus in (({}, 4), ({"gpus-per-node": 8}, 8), ({"gpus-per-node": 0}, None)):
        study = read_study(write_study(DENSE, ranks=4, slurm={"time": 60, **slurm}))
        assert sbatch_parameters(study)["slurm_gpus_per_node"] == gpus
    study = read_study(write_study(DENSE, ranks=4, slurm={"time": 60, "gres": "gpu:h200:4"}))
    parameters = sbatch_parameters(study)
    assert (parameters["slurm_gres"], parameters["slurm_gpus_per_node"]) == ("gpu:h200:4", None)


def test_submit_without_submitit_or_slurm_names_the_remedy(
    write_study: WriteStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_study(DENSE, flags="--train-iters 3", slurm={"time": 60})
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="submit needs Slurm's command sbatch"):
        sweep.main([str(path), "submit"])
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ConfigError, match=r"pip install 'megatron-sffn\[slurm\]'"):
        sweep.main([str(path), "submit"])


def test_slurm_has_to_be_a_mapping(write_study: WriteStudy) -> None:
    with pytest.raises(ConfigError, match="slurm 'gpu' has to be parameters of sbatch"):
        read_study(write_study(DENSE, slurm="gpu"))
