"""Submits the unfinished runs of a study to Slurm as job arrays, and stops these jobs.

Inputs: a study with parameters of Slurm, and its forecasts. Outputs: arrays of a job for each run,
submitit's files in the folder `slurm` of the study, and the ids of the jobs in `slurm_jobs.json`.

Design notes: a learning rate that is fitted is not known at submission. These runs are an array of
their own that starts when the jobs before it have ended, and each computes its rate then. So are
runs beyond the edge of a ladder; those that are not needed end at once.
A plain `scancel` kills a run 30 seconds after its warning. SIGINT has no such limit, so `stop`
cancels the jobs that wait and sends SIGINT to those that run.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megatron_sffn.study.learning_rates import FITTED
from megatron_sffn.study.running.foresee import Forecast
from megatron_sffn.study.running.ladder import is_needed, with_rate
from megatron_sffn.study.running.launch import STOP_SECONDS
from megatron_sffn.study.running.one_run import check_flags, run_folder, state_of
from megatron_sffn.study.running.reuse import take_over_runs
from megatron_sffn.study.running.slurm_job import RunJob
from megatron_sffn.study.running.study_file import Study, known_names
from megatron_sffn.utils.atomic_files import atomic_write_text, read_json_object
from megatron_sffn.utils.errors import ConfigError

if TYPE_CHECKING:
    from submitit import Job

FOLDER, JOBS = "slurm", "slurm_jobs.json"
WARNING_SECONDS = STOP_SECONDS + 60
"""Seconds before the time limit at which a run is asked to save."""
TIME_LIMITS = 20
"""How often a run is requeued at its time limit, so that one without progress ends."""
SET_BY_SUBMIT = {
    "nodes": "a run has one node",
    "ntasks_per_node": "torchrun starts the ranks",
    "array_parallelism": "parallel gives it",
    "dependency": "the ladder determines it",
    "use_srun": "only srun's processes get the warning before the time limit",
    "num_gpus": "gpus-per-node is its new name",
}
"""Parameters of submitit that a study's file may not give, and why."""
OTHER_GPUS = {"gres", "gpus_per_task"}
"""Parameters that ask for GPUs in place of gpus-per-node."""


def submit_runs(study: Study, forecasts: Sequence[Forecast]) -> dict[str, int]:
    """Submit all runs that have neither finished nor are running.

    Returns:
        Id of a job array -> number of its runs.
    """
    _check_commands("submit", "sbatch", "srun")
    take_over_runs(study, forecasts)
    for forecast in forecasts:
        if (ready := with_rate(study, forecast, forecasts)) is not None:
            check_flags(run_folder(study, ready), ready)
    arrays: dict[str, int] = {}
    for names in waiting_names(study, forecasts):
        jobs = submit_array(study, names, after=list(arrays))
        arrays[_array_id(jobs[0])] = len(names)
    return arrays


def waiting_names(study: Study, forecasts: Sequence[Forecast]) -> list[list[str]]:
    """The names of the runs to submit, in groups each of which needs the losses of those before.

    The first group has the runs whose rate is known. Those beyond the edges of ladders follow, a
    group for each place, and at last the runs with a fitted rate.
    """
    groups: dict[tuple[bool, int], list[str]] = {}
    for forecast in forecasts:
        is_waiting = state_of(study, forecast).name in ("waiting", "failed")
        if is_waiting and is_needed(study, forecast, forecasts) is not False:
            run = forecast.run
            key = run.rate_source == FITTED, abs(run.beyond_edge)
            groups.setdefault(key, []).append(run.name)
    return [names for _, names in sorted(groups.items())]


def submit_array(
    study: Study, names: Sequence[str], *, after: Sequence[str] = (), cluster: str = "slurm"
) -> list[Job[None]]:
    """Submit some runs as one array of jobs.

    Args:
        study: the study.
        names: the names of the runs.
        after: ids of jobs that have to end before these start.
        cluster: name of submitit's executor: "slurm", or in tests "local".

    Raises:
        ConfigError: if a parameter is unknown, or if Slurm refuses the array.
    """
    from submitit import AutoExecutor
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    parameters = sbatch_parameters(study, after)
    executor = AutoExecutor(study.folder / FOLDER, cluster, slurm_max_num_timeout=TIME_LIMITS)
    executor.update_parameters(**parameters)
    try:
        jobs: list[Job[None]] = executor.submit_array([RunJob(study, name) for name in names])
    except (FailedJobError, FailedSubmissionError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"sbatch has refused the jobs ({reason}); correct slurm in the study's file"
        ) from error
    ids = [*_submitted_ids(study), _array_id(jobs[0])]
    atomic_write_text(study.folder / JOBS, json.dumps({"ids": ids}) + "\n")
    return jobs


def stop_jobs(study: Study) -> list[str]:
    """Cancel the waiting jobs of a study, and let the running ones save and end.

    Returns:
        The ids of all jobs and arrays that were submitted.
    """
    ids = _submitted_ids(study)
    if ids:
        _check_commands(f"stop of the Slurm jobs {', '.join(ids)}", "scancel")
        # Those that wait come first: a free place would start one of them.
        for option in ("--state=PENDING", "--signal=INT"):
            subprocess.run(["scancel", "--quiet", option, *ids], check=False)
    return ids


def sbatch_parameters(study: Study, after: Sequence[str] = ()) -> dict[str, Any]:
    """The parameters of submitit's executor.

    Raises:
        ConfigError: if a name is unknown or set by `submit`, or the time is no number of minutes.
    """
    _check_names(study)
    minutes = study.slurm.get("time")
    if not isinstance(minutes, int) or isinstance(minutes, bool) or minutes < 1:
        raise ConfigError(
            f"time {minutes} of slurm in the study's file is no whole number of minutes; write for "
            "example slurm: {time: 240}"
        )
    given = {
        "job_name": study.folder.name,
        "signal_delay_s": WARNING_SECONDS,
        "gpus_per_node": None if OTHER_GPUS & set(study.slurm) else study.ranks,
        **study.slurm,
        "nodes": 1,
        "ntasks_per_node": 1,
        "array_parallelism": study.parallel,
        "dependency": f"afterany:{':'.join(after)}" if after else None,
    }
    given["gpus_per_node"] = given["gpus_per_node"] or None  # 0 stands for a machine without GPUs
    del given["time"]
    return {"timeout_min": minutes, **{f"slurm_{name}": value for name, value in given.items()}}


def _check_names(study: Study) -> None:
    """Refuse names of parameters that submitit does not know, or that `submit` sets."""
    from submitit import SlurmExecutor

    valid = SlurmExecutor._valid_parameters() - set(SET_BY_SUBMIT)
    for name in study.slurm:
        shown = name.replace("_", "-")
        if name in SET_BY_SUBMIT:
            raise ConfigError(
                f"{shown} of slurm in the study's file is set for you: {SET_BY_SUBMIT[name]}; "
                "remove it"
            )
        if name not in valid:
            known = [parameter.replace("_", "-") for parameter in sorted(valid)]
            raise ConfigError(
                f"{shown} of slurm in the study's file is unknown; {known_names(shown, known)}"
            )


def _check_commands(asked_by: str, *commands: str) -> None:
    """Refuse to go on without the commands of Slurm."""
    for command in commands:
        if shutil.which(command) is None:
            raise ConfigError(
                f"{asked_by} needs Slurm's command {command}, which this machine has not; call it "
                "on a login node of the cluster"
            )


def _array_id(job: Job[None]) -> str:
    """The id of the array of a job."""
    return job.job_id.partition("_")[0]


def _submitted_ids(study: Study) -> list[str]:
    """The ids of all arrays that were submitted for a study."""
    return list(read_json_object(study.folder / JOBS).get("ids", []))
