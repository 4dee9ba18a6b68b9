"""Trains one run of a study in a job of Slurm.

Inputs: a study and the name of a run, which submitit has pickled. Outputs: the files of the run, as
the local sweep leaves them.

Design notes: submitit imports this module to read the pickle, before the process is prepared for
Megatron, so what imports Megatron is imported in the call. Before the time limit, and before a
preemption that warns, submitit handles SIGUSR2: it calls `checkpoint` and requeues the job.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING

from megatron_sffn.study.running.launch import POLL_SECONDS, RunFailedError, TrainingProcess
from megatron_sffn.study.running.one_run import (
    LOCK,
    check_flags,
    is_finished,
    locked,
    reason_of_failure,
    run_environment,
    start_run,
    write_failure,
)
from megatron_sffn.study.running.study_file import Study
from megatron_sffn.utils.errors import ConfigError
from megatron_sffn.utils.warning_filters import silence

if TYPE_CHECKING:
    from submitit.helpers import DelayedSubmission

    from megatron_sffn.study.running.foresee import Forecast


class RunJob:
    """What a job calls: it trains one run until the run has finished or is stopped.

    Args:
        study: the study.
        name: the name of the run.
    """

    def __init__(self, study: Study, name: str) -> None:
        self._study, self._name = study, name
        self._folder = study.folder_of(name)
        self._process: TrainingProcess | None = None

    def __call__(self) -> None:
        """Train the run, from its newest checkpoint; SIGINT lets it save and end.

        Raises:
            Exception: if the run failed; the reason is also in its folder.
        """
        try:
            self._train_if_unfinished()
        except KeyboardInterrupt:
            self._stop()
        except Exception as error:
            write_failure(self._folder, str(error))
            raise

    def checkpoint(self) -> DelayedSubmission:
        """Let the run save and end; returns what the requeued job calls."""
        from submitit.helpers import DelayedSubmission

        self._stop()
        return DelayedSubmission(RunJob(self._study, self._name))

    def _train_if_unfinished(self) -> None:
        """Train the run, unless it is not needed, has finished or is running elsewhere."""
        silence()

        from megatron_sffn.patches import prepare

        prepare()  # before Megatron is imported

        from megatron_sffn.study.running.foresee import valid_forecasts
        from megatron_sffn.study.running.ladder import is_needed, with_rate

        forecasts = valid_forecasts(self._study)
        forecast = next(run for run in forecasts if run.run.name == self._name)
        if not is_needed(self._study, forecast, forecasts):
            return
        with locked(self._folder / LOCK) as lock:
            if lock is None or is_finished(self._folder, forecast):
                return
            ready = with_rate(self._study, forecast, forecasts)
            if ready is None:
                raise ConfigError(
                    "a run of its ladder has not finished, so that its learning rate is unknown; "
                    "see the state of the ladder, and submit the study again"
                )
            check_flags(self._folder, ready)
            self._train(ready, lock)

    def _train(self, forecast: Forecast, lock: IO[str]) -> None:
        """Start the run and wait for its end."""
        with _blocked(signal.SIGUSR2):
            self._process = start_run(self._study, forecast, run_environment(), lock)
        while self._process.poll() is None:
            time.sleep(POLL_SECONDS)
        reason = reason_of_failure(self._folder, forecast, self._process)
        if reason is not None:
            raise RunFailedError(reason)

    def _stop(self) -> None:
        """Stop the run after its step and a checkpoint."""
        if self._process is not None:
            self._process.ask_to_stop()
            self._process.wait_until_stopped()


@contextlib.contextmanager
def _blocked(number: signal.Signals) -> Iterator[None]:
    """Block a signal; processes that are started meanwhile never get it.

    Some clusters send their warning to all processes of a job. It would end torchrun before its
    ranks have saved; the job itself asks the run to stop.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
