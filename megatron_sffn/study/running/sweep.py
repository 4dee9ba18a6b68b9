"""Runs a study: several runs at a time, each resumed from its checkpoint until it has finished.

Inputs: a study's forecasts. Outputs: a folder for each run, and the tables of the results.

Design notes: if the sweep is killed, its runs go on and keep the locks of their folders; the next
sweep waits for them instead of starting them twice.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import torch

from megatron_sffn.patches.cpu import is_host
from megatron_sffn.study.running.foresee import Forecast
from megatron_sffn.study.running.ladder import is_needed, needed_runs, with_rate
from megatron_sffn.study.running.launch import POLL_SECONDS, Display, TrainingProcess
from megatron_sffn.study.running.one_run import (
    LOCK,
    check_flags,
    is_finished,
    is_locked,
    locked,
    reason_of_failure,
    run_environment,
    run_folder,
    start_run,
    state_of,
    write_failure,
)
from megatron_sffn.study.running.result_tables import write_tables
from megatron_sffn.study.running.reuse import take_over_runs
from megatron_sffn.study.running.study_file import Study
from megatron_sffn.study.runs import SUMMARY
from megatron_sffn.utils.atomic_files import read_json_object
from megatron_sffn.utils.errors import ConfigError
from megatron_sffn.utils.human_time import human_time

ESTIMATE_SECONDS = 10.0
"""Seconds between two estimates of the time left, which read the logs of all runs."""


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
        self._study, self._forecasts, self._stream = study, list(forecasts), stream
        self._slots = _Slots.of(study)
        self._running: dict[int, tuple[Forecast, TrainingProcess]] = {}
        self._failed: list[str] = []
        self._undecided = 0
        self._left: float | None = None
        self._estimated_at = 0.0

    def run(self) -> list[str]:
        """Train all unfinished runs; returns the names of those that failed.

        Raises:
            ConfigError: if a run was trained with other flags than the file gives now.
            KeyboardInterrupt: after every run has saved a checkpoint and ended.
        """
        take_over_runs(self._study, self._forecasts)
        waiting = [run for run in self._forecasts if not is_finished(self._folder(run), run)]
        self._check_flags()
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
        self._check_flags()  # of runs whose ladder has gone on since they were trained
        return self._failed

    def _check_flags(self) -> None:
        """Refuse runs that were trained with other flags, as far as their rates are known."""
        for forecast in filter(None, map(self._with_rate, self._forecasts)):
            check_flags(self._folder(forecast), forecast)

    def _folder(self, forecast: Forecast) -> Path:
        return run_folder(self._study, forecast)

    def _start(self, waiting: list[Forecast]) -> list[Forecast]:
        """Start runs in the free slots; returns those that still wait."""
        left, foreign, self._undecided = [], 0, 0
        for forecast in waiting:
            needed = is_needed(self._study, forecast, self._forecasts)
            if needed is False:
                self._forecasts.remove(forecast)
                continue
            self._undecided += needed is None
            slot = self._slots.free(self._running, foreign)
            ready = None if slot is None or not needed else self._with_rate(forecast)
            if slot is None or ready is None:
                left.append(forecast)
                continue
            with locked(self._folder(forecast) / LOCK) as lock:
                if lock is None:  # it is still running from a sweep that was killed
                    foreign += 1
                    left.append(forecast)
                elif not is_finished(self._folder(forecast), forecast):
                    environment = run_environment(self._slots.gpus_of(slot))
                    process = start_run(self._study, ready, environment, lock)
                    self._running[slot] = forecast, process
        return left

    def _with_rate(self, forecast: Forecast) -> Forecast | None:
        """The run with its learning rate; None while the ladder of its point trains."""
        return with_rate(self._study, forecast, self._forecasts)

    def _without_ladder(self, waiting: list[Forecast]) -> list[Forecast]:
        """The waiting runs; those whose ladder has failed have failed too."""
        self._forecasts = needed_runs(self._study, self._forecasts)
        waiting = [run for run in waiting if run in self._forecasts]
        for forecast in [run for run in waiting if self._with_rate(run) is None]:
            self._failed.append(forecast.run.name)
            reason = "a run of its ladder has failed, so that its learning rate is unknown"
            write_failure(self._folder(forecast), reason)
        return [run for run in waiting if run.run.name not in self._failed]

    def _collect(self) -> None:
        """Look at the running processes, and free the slots of those that have ended."""
        for slot, (forecast, process) in list(self._running.items()):
            if process.poll() is None:
                continue
            del self._running[slot]
            reason = reason_of_failure(self._folder(forecast), forecast, process)
            if reason is None:
                write_results(self._study, self._forecasts)
            else:
                self._failed.append(forecast.run.name)
                write_failure(self._folder(forecast), reason)

    def _progress(self, waiting: int) -> str:
        """A line of progress."""
        runs = len(self._forecasts) - self._undecided
        finished = len(self._forecasts) - waiting - len(self._running) - len(self._failed)
        parts = [f"{finished} of {runs} finished"]
        parts += [f"{len(self._failed)} failed"] if self._failed else []
        if time.monotonic() - self._estimated_at > ESTIMATE_SECONDS:
            self._left = seconds_left(self._study, needed_runs(self._study, self._forecasts))
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

    def gpus_of(self, slot: int) -> list[str]:
        """The GPUs of the run in a slot; none on a CPU."""
        return self.gpus[slot * self.per_run : (slot + 1) * self.per_run]


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
    if not is_locked(path):
        return None
    process = int(path.read_text())
    os.kill(process, signal.SIGINT)
    return process
