"""One run of a study: its folder and state, its command, its start and the reason of a failure.

Inputs: a study, and the forecast of a run. Outputs: the files in the folder of the run.

Design notes: the local sweep and the jobs of Slurm start runs with the same functions, so that each
resumes what the other has begun. The state of a run is in its own folder, where it is found after
any kill. A run holds the lock of its folder as an inherited file descriptor: if the process that
started it is killed, the run goes on, and nobody starts it a second time. A job of Slurm imports
this module before it has prepared its process for Megatron, so nothing here may import Megatron.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from megatron_sffn.study.running.launch import STOP_SECONDS, TrainingProcess
from megatron_sffn.study.running.study_file import Study
from megatron_sffn.study.runs import SUMMARY, TENSORBOARD
from megatron_sffn.train.log_status import Status
from megatron_sffn.utils.atomic_files import atomic_write_text, read_json_object
from megatron_sffn.utils.errors import ConfigError

if TYPE_CHECKING:
    from megatron_sffn.study.running.foresee import Forecast

LOG, FAILURE, FLAGS, LOCK = "train.log", "failure.txt", "flags.txt", "run.lock"
SAVES = 5
"""Checkpoints of a run whose flags say nothing of them."""


@dataclass(frozen=True, kw_only=True)
class RunState:
    """The state of a run by the files in its folder.

    Args:
        name: "finished", "running", "failed", or "waiting".
        status: progress by the log.
        reason: of a failure, in one line.
    """

    name: str
    status: Status
    reason: str = ""


def run_folder(study: Study, forecast: Forecast) -> Path:
    """The folder of a run."""
    return study.folder_of(forecast.run.name)


def state_of(study: Study, forecast: Forecast) -> RunState:
    """The state of a run."""
    folder, status = run_folder(study, forecast), Status()
    if (folder / LOG).exists():
        with (folder / LOG).open(errors="replace") as log:
            for line in log:
                status.read(line)
    if is_finished(folder, forecast):
        return RunState(name="finished", status=status)
    if is_locked(folder / LOCK):
        return RunState(name="running", status=status)
    if (folder / FAILURE).exists():
        lines = (folder / FAILURE).read_text().strip().splitlines()
        return RunState(name="failed", status=status, reason=lines[-1] if lines else "")
    return RunState(name="waiting", status=status)


def is_finished(folder: Path, forecast: Forecast) -> bool:
    """True if a run was trained to its last step."""
    return bool(read_json_object(folder / SUMMARY).get("iterations") == forecast.train_iters)


def command_of(study: Study, forecast: Forecast) -> list[str]:
    """The command of a run."""
    folder = run_folder(study, forecast)
    flags = [*forecast.run.flags, "--save", str(folder), "--load", str(folder)]
    flags += ["--tensorboard-dir", str(folder / TENSORBOARD), "--exit-signal", "SIGINT"]
    if "--save-interval" not in flags:
        interval = max(1, -(-forecast.train_iters // SAVES))
        # Only the newest checkpoint is kept.
        flags += ["--save-interval", str(interval)]
        flags += ["--save-retain-interval", str(interval * (forecast.train_iters + 1))]
    launcher = "torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node"
    ranks = [] if study.ranks == 1 else [*shlex.split(launcher), str(study.ranks), "-m"]
    return [sys.executable, "-m", *ranks, "megatron_sffn.pretrain", *flags]


def run_environment(gpus: Sequence[str] = ()) -> dict[str, str]:
    """The environment variables of a run.

    Args:
        gpus: ids of its GPUs; none for those that this process sees.
    """
    return {
        "OMP_NUM_THREADS": "1",
        **os.environ,
        **({"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}),
        "PYTHONUNBUFFERED": "1",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(STOP_SECONDS),
    }


def start_run(
    study: Study, forecast: Forecast, environment: Mapping[str, str], lock: IO[str]
) -> TrainingProcess:
    """Start a run.

    Args:
        study: its study.
        forecast: the run, with its learning rate.
        environment: its environment variables.
        lock: the locked file of its folder, which the run keeps open.
    """
    folder = run_folder(study, forecast)
    (folder / FAILURE).unlink(missing_ok=True)
    atomic_write_text(folder / FLAGS, f"{shlex.join(forecast.run.flags)}\n")
    command = command_of(study, forecast)
    return TrainingProcess(command, folder / LOG, environment, keep_open=[lock.fileno()])


def reason_of_failure(folder: Path, forecast: Forecast, process: TrainingProcess) -> str | None:
    """Why a process that has ended did not finish its run; None if it did."""
    if is_finished(folder, forecast):
        return None
    return process.last_lines() or f"exit code {process.poll()}"


def write_failure(folder: Path, reason: str) -> None:
    """Keep the reason of a failure in the folder of a run."""
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_text(folder / FAILURE, f"{reason}\n")


def check_flags(folder: Path, forecast: Forecast) -> None:
    """Refuse to go on with a run whose flags were others before."""
    if not (folder / FLAGS).exists():
        return
    before = flag_values(shlex.split((folder / FLAGS).read_text()))
    now = flag_values(forecast.run.flags)
    if before != now:
        changed = (
            shlex.join((name, *before[name])) for name in before if before[name] != now.get(name)
        )
        raise ConfigError(
            f"{folder} was trained with other flags ({', '.join(changed) or 'fewer'}); remove it, "
            "or give the study another folder"
        )


def flag_values(words: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Flag without dashes -> its values; of a flag that is given twice the last one counts."""
    values: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            name, equals, value = word.removeprefix("--").partition("=")
            values[name] = [value] if equals else []
        else:
            values[name].append(word)
    return {name: tuple(given) for name, given in values.items()}


@contextlib.contextmanager
def locked(path: Path) -> Iterator[IO[str] | None]:
    """Lock a file while this process or one that inherited it lives; None if another has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        yield file


def is_locked(path: Path) -> bool:
    """True if a process has locked a file."""
    if not path.exists():
        return False
    with locked(path) as lock:
        return lock is None
