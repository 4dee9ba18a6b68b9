"""Runs a study: several runs at a time, each resumed from its checkpoint until it has finished.

Inputs: a study's forecasts. Outputs: a folder for each run, and the tables of the results.

Design notes: the state of a run is in its own folder, so that `status` and the next `run` find it
after any kill. A run holds the lock of its folder as an inherited file descriptor: if the sweep is
killed, its runs go on, and the next sweep waits for them instead of starting them twice.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import signal
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TextIO

import torch

from megatron_sffn.patches.cpu import is_host
from megatron_sffn.study.running.foresee import Forecast
from megatron_sffn.study.running.ladder import with_rate
from megatron_sffn.study.running.launch import (
    POLL_SECONDS,
    STOP_SECONDS,
    Display,
    Status,
    TrainingProcess,
)
from megatron_sffn.study.running.result_tables import TENSORBOARD, write_tables
from megatron_sffn.study.running.study_file import Study
from megatron_sffn.study.runs import SUMMARY
from megatron_sffn.utils.atomic_files import atomic_write_text, read_json_object
from megatron_sffn.utils.errors import ConfigError
from megatron_sffn.utils.human_time import human_time

LOG, FAILURE, FLAGS, LOCK = "train.log", "failure.txt", "flags.txt", "run.lock"
SAVES = 5
"""Checkpoints of a run whose flags say nothing of them."""
ESTIMATE_SECONDS = 10.0
"""Seconds between two estimates of the time left, which read the logs of all runs."""


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
    return study.folder / "runs" / forecast.run.name


def state_of(study: Study, forecast: Forecast) -> RunState:
    """The state of a run."""
    folder, status = run_folder(study, forecast), Status()
    if (folder / LOG).exists():
        with (folder / LOG).open(errors="replace") as log:
            for line in log:
                status.read(line)
    if is_finished(folder, forecast):
        return RunState(name="finished", status=status)
    if _is_locked(folder / LOCK):
        return RunState(name="running", status=status)
    if (folder / FAILURE).exists():
        lines = (folder / FAILURE).read_text().strip().splitlines()
        return RunState(name="failed", status=status, reason=lines[-1] if lines else "")
    return RunState(name="waiting", status=status)


def is_finished(folder: Path, forecast: Forecast) -> bool:
    """True if a run was trained to its last step."""
    return bool(read_json_object(folder / SUMMARY).get("iterations") == forecast.train_iters)


def write_results(study: Study, forecasts: Sequence[Forecast]) -> int:
    """Write the tables of the finished runs; returns their number."""
    folders = {forecast.run.name: run_folder(study, forecast) for forecast in forecasts}
    return write_tables(study.folder, forecasts, folders)


def seconds_left(study: Study, forecasts: Sequence[Forecast]) -> float | None:
    """Seconds until all runs have finished, at the rate of those that have; None without one."""
    flops, seconds, waiting = 0.0, 0.0, 0.0
    for forecast in forecasts:
        if forecast.reason is not None:
            continue
        folder = run_folder(study, forecast)
        if not is_finished(folder, forecast):
            steps = state_of(study, forecast).status.iteration
            waiting += forecast.flops * (1 - steps / forecast.train_iters)
        elif rate := read_json_object(folder / SUMMARY).get("tokens_per_second"):
            flops, seconds = flops + forecast.flops, seconds + forecast.tokens / rate
    return waiting / study.parallel * seconds / flops if flops else None


class Sweep:
    """Starts the runs of a study, and waits for them.

    Args:
        study: the study.
        forecasts: of all its runs.
        stream: the terminal.
    """

    def __init__(
        self, study: Study, forecasts: Sequence[Forecast], stream: TextIO = sys.stderr
    ) -> None:
        self._study, self._forecasts, self._stream = study, forecasts, stream
        self._slots = _Slots.of(study)
        self._running: dict[int, tuple[Forecast, TrainingProcess]] = {}
        self._failed: list[str] = []
        self._left: float | None = None
        self._estimated_at = 0.0

    def run(self) -> list[str]:
        """Train all unfinished runs; returns the names of those that failed.

        Raises:
            KeyboardInterrupt: after every run has saved a checkpoint and ended.
        """
        waiting = [run for run in self._forecasts if not is_finished(self._folder(run), run)]
        for forecast in filter(None, map(self._with_rate, self._forecasts)):
            _check_flags(self._folder(forecast), forecast)
        display = Display("sweep", self._stream)
        try:
            while waiting or self._running:
                waiting = self._start(waiting)
                if self._failed and not self._running:
                    waiting = self._without_ladder(waiting)
                display.show(self._progress(len(waiting)))
                time.sleep(POLL_SECONDS)
                self._collect()
        except BaseException:
            self._stop()
            raise
        finally:
            display.end()
            write_results(self._study, self._forecasts)
        return self._failed

    def _folder(self, forecast: Forecast) -> Path:
        return run_folder(self._study, forecast)

    def _start(self, waiting: list[Forecast]) -> list[Forecast]:
        """Start runs in the free slots; returns those that still wait."""
        left, foreign = [], 0
        for forecast in waiting:
            slot = self._slots.free(self._running, foreign)
            ready = None if slot is None else self._with_rate(forecast)
            if slot is None or ready is None:
                left.append(forecast)
                continue
            with locked(self._folder(forecast) / LOCK) as lock:
                if lock is None:  # it is still running from a sweep that was killed
                    foreign += 1
                    left.append(forecast)
                elif not is_finished(self._folder(forecast), forecast):
                    process = self._process(ready, self._slots.environment(slot), lock)
                    self._running[slot] = forecast, process
        return left

    def _with_rate(self, forecast: Forecast) -> Forecast | None:
        """The run with its learning rate; None while the ladder of its point trains."""
        folders = {run.run.name: self._folder(run) for run in self._forecasts}
        return with_rate(forecast, self._forecasts, folders)

    def _without_ladder(self, waiting: list[Forecast]) -> list[Forecast]:
        """The waiting runs; those whose ladder has failed have failed too."""
        lost = [run for run in waiting if self._with_rate(run) is None]
        for forecast in lost:
            self._failed.append(forecast.run.name)
            reason = "a run of its ladder has failed, so that its learning rate is unknown"
            self._folder(forecast).mkdir(parents=True, exist_ok=True)
            atomic_write_text(self._folder(forecast) / FAILURE, f"{reason}\n")
        return [run for run in waiting if run.run.name not in self._failed]

    def _process(
        self, forecast: Forecast, environment: dict[str, str], lock: IO[str]
    ) -> TrainingProcess:
        """Start a run."""
        folder = self._folder(forecast)
        (folder / FAILURE).unlink(missing_ok=True)
        atomic_write_text(folder / FLAGS, f"{shlex.join(forecast.run.flags)}\n")
        command = command_of(self._study, forecast)
        return TrainingProcess(command, folder / LOG, environment, keep_open=[lock.fileno()])

    def _collect(self) -> None:
        """Look at the running processes, and free the slots of those that have ended."""
        for slot, (forecast, process) in list(self._running.items()):
            code = process.poll()
            if code is None:
                continue
            del self._running[slot]
            if not is_finished(self._folder(forecast), forecast):
                self._failed.append(forecast.run.name)
                reason = process.last_lines() or f"exit code {code}"
                atomic_write_text(self._folder(forecast) / FAILURE, f"{reason}\n")
            else:
                write_results(self._study, self._forecasts)

    def _progress(self, waiting: int) -> str:
        """A line of progress."""
        finished = len(self._forecasts) - waiting - len(self._running) - len(self._failed)
        parts = [f"{finished} of {len(self._forecasts)} finished"]
        parts += [f"{len(self._failed)} failed"] if self._failed else []
        if time.monotonic() - self._estimated_at > ESTIMATE_SECONDS:
            self._left = seconds_left(self._study, self._forecasts)
            self._estimated_at = time.monotonic()
        parts += [f"{human_time(self._left)} left"] if self._left is not None else []
        parts += [f"{run.run.name}: {process.status}" for run, process in self._running.values()]
        return " | ".join(parts)

    def _stop(self) -> None:
        """Stop all runs, each after its step and a checkpoint."""
        for _, process in self._running.values():
            process.ask_to_stop()
        with contextlib.suppress(OSError):
            print("\nstopping after this step; again to stop at once", file=self._stream)
        for _, process in self._running.values():
            process.wait_until_stopped()


@dataclass(frozen=True, kw_only=True)
class _Slots:
    """Places for runs at the same time, each with GPUs of its own where there are GPUs.

    Args:
        number: number of runs at the same time.
        gpus: ids of the GPUs that may be used; none on a CPU.
        per_run: number of GPUs of a run.
    """

    number: int
    gpus: list[str] = field(default_factory=list)
    per_run: int = 1

    @classmethod
    def of(cls, study: Study) -> _Slots:
        """The slots of a study on this machine.

        Raises:
            ConfigError: if the machine has too few GPUs.
        """
        if is_host():
            return cls(number=study.parallel)
        named = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        gpus = [name for name in named if name] or list(map(str, range(torch.cuda.device_count())))
        wanted = study.parallel * study.ranks
        if len(gpus) < wanted:
            raise ConfigError(
                f"parallel {study.parallel} with ranks {study.ranks} needs {wanted} GPUs, and this "
                f"machine has {len(gpus)}; lower parallel in the study's file"
            )
        return cls(number=study.parallel, gpus=gpus, per_run=study.ranks)

    def free(self, taken: Collection[int], foreign: int) -> int | None:
        """A slot without a run; None if all are taken, some by runs of a former sweep."""
        slots = [slot for slot in range(self.number) if slot not in taken]
        return slots[foreign] if foreign < len(slots) else None

    def environment(self, slot: int) -> dict[str, str]:
        """The environment variables of a run in a slot."""
        gpus = self.gpus[slot * self.per_run : (slot + 1) * self.per_run]
        return {
            "OMP_NUM_THREADS": "1",
            **os.environ,
            **({"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}),
            "PYTHONUNBUFFERED": "1",
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(STOP_SECONDS),
        }


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


def _check_flags(folder: Path, forecast: Forecast) -> None:
    """Refuse to go on with a run whose flags were others before."""
    path, flags = folder / FLAGS, f"{shlex.join(forecast.run.flags)}\n"
    if path.exists() and (before := path.read_text()) != flags:
        now = flags.strip().split(" --")
        changed = [flag for flag in before.strip().split(" --") if flag not in now]
        raise ConfigError(
            f"{folder} was trained with other flags ({' '.join(changed) or 'fewer'}); remove it, "
            "or give the study another folder"
        )


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


def _is_locked(path: Path) -> bool:
    if not path.exists():
        return False
    with locked(path) as lock:
        return lock is None


@contextlib.contextmanager
def only_sweep(study: Study) -> Iterator[None]:
    """Let this process be the only sweep of a study; `stop` finds it.

    Raises:
        ConfigError: if another sweep runs the study.
    """
    path = study.folder / "sweep.pid"
    with locked(path) as lock:
        if lock is None:
            raise ConfigError(
                f"{study.folder} is in use by another sweep (process {path.read_text()}); wait for "
                "its end, or stop it: megatron-sffn sweep STUDY.yaml stop"
            )
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def stop_sweep(study: Study) -> int | None:
    """Ask the sweep of a study to stop; returns its process id, None if there is no sweep."""
    path = study.folder / "sweep.pid"
    if not _is_locked(path):
        return None
    process = int(path.read_text())
    os.kill(process, signal.SIGINT)
    return process
