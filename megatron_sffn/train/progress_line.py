"""On a terminal, one line of progress in place of Megatron's lines, which go to a file.

Inputs: the steps and evaluations of a run, and what Megatron prints. Outputs: a line that is
rewritten with every step, a line for each evaluation, and `train.log` in the run's folder.

Design notes:
- Each rank decides by its own stdout, and the last rank, which has the loss, draws the line.
  Without a terminal nothing is changed: tools parse Megatron's lines.
- The loss is that of Megatron's last line. Warnings and errors stay on the terminal.
- The name of the file is that of a study's runs, so that `megatron-sffn sweep` finds it.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import statistics
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import override

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from megatron_sffn.train.evaluations import Evaluation
from megatron_sffn.train.log_status import Status
from megatron_sffn.utils.human_size import human_count

LOG = "train.log"

RERUN_LOGGER = logging.getLogger("megatron.core.rerun_state_machine")
MODE = re.compile(r"RerunMode\.|Result validation enabled")
"""Warnings of `RERUN_LOGGER` that only say in which mode it is: two for each evaluation."""

RECENT_STEPS = 10
"""The speed in the line is the median of so many steps."""


class ProgressLine:
    """The line of one rank.

    Args:
        args: Megatron's namespace.
        folder: the run's folder.

    Attributes:
        log: file of what Megatron prints; None without a terminal, or with `--sffn-verbose`.
    """

    def __init__(self, args: Namespace, folder: Path) -> None:
        self.args = args
        is_used = sys.stdout.isatty() and not args.sffn_verbose
        self.log = folder / LOG if is_used else None
        self._terminal = sys.stdout
        self._draws = is_used and args.rank == args.world_size - 1
        self._bar: tqdm | None = None
        self._status = Status()
        self._last_evaluation = ""
        self._speed: dict[str, str] = {}

    def __deepcopy__(self, _: object) -> ProgressLine:
        """The same line: Megatron copies its config, whose hooks draw the line."""
        return self

    @contextlib.contextmanager
    def in_place_of_log(self) -> Iterator[None]:
        """Send what this rank prints to the file; without a terminal do nothing."""
        if self.log is None:
            yield
            return
        self.log.parent.mkdir(parents=True, exist_ok=True)
        RERUN_LOGGER.addFilter(_is_no_mode)
        try:
            with (
                _Log(self.log, self._status) as log,
                contextlib.redirect_stdout(log),
                logging_redirect_tqdm(),  # warnings appear above the line
            ):
                yield
        finally:
            RERUN_LOGGER.removeFilter(_is_no_mode)
            if self._bar is not None:
                self._bar.set_description("training", refresh=False)
                self._bar.set_postfix(self._numbers())
                self._bar.close()

    def print(self, text: str) -> None:
        """Print on the terminal, or on stdout if there is none."""
        if self._bar is not None:
            self._bar.write(text, file=self._terminal)
        else:
            print(text, file=None if self.log is None else self._terminal, flush=True)

    def before_forward(self, *, training: bool) -> None:
        """Called before the forward pass of each microbatch."""
        if not self._draws:
            return
        if self._bar is None and training:
            # Some terminals report 0 columns.
            has_width = os.get_terminal_size(self._terminal.fileno()).columns > 0
            self._bar = tqdm(
                total=self.args.train_iters,
                initial=self.args.curr_iteration,
                unit="step",
                miniters=1,
                ncols=None if has_width else 80,
                dynamic_ncols=has_width,
                file=self._terminal,
            )
        phase = "training" if training else "evaluating"
        if self._bar is not None and not self._bar.desc.startswith(phase):
            self._bar.set_description(phase)

    def after_step(self, iteration: int, samples_per_second: list[float]) -> None:
        """Called when all microbatches of a training step have run.

        Args:
            iteration: steps that the model was trained.
            samples_per_second: of the steps so far.
        """
        if self._bar is None:
            return
        if samples_per_second:
            speed = statistics.median(samples_per_second[-RECENT_STEPS:]) * self.args.seq_length
            self._speed = {"tokens/s": human_count(speed).replace(" ", "")}
        self._bar.set_postfix(self._numbers(), refresh=False)
        self._bar.update(iteration - self._bar.n)

    def _numbers(self) -> dict[str, str]:
        """The numbers behind the bar."""
        loss = self._status.loss
        return self._speed if loss is None else {"loss": f"{loss:.3f}", **self._speed}

    def after_evaluation(self, evaluation: Evaluation) -> None:
        """Called when all data sets of an evaluation have been read."""
        name = "test" if evaluation.is_test else "validation"
        text = f"step {evaluation.iteration}: {name} loss {evaluation.loss:.4f}"
        # Megatron evaluates twice after the last step.
        if self._draws and text != self._last_evaluation:
            self.print(text)
        self._last_evaluation = text


class _Log(io.TextIOWrapper):
    """The file of what Megatron prints, to which several ranks append.

    Args:
        path: path of the file.
        status: takes the numbers of the lines.
    """

    def __init__(self, path: Path, status: Status) -> None:
        super().__init__(path.open("ab"), encoding="utf-8", line_buffering=True)
        self._status = status

    @override
    def write(self, text: str) -> int:
        self._status.read(text)
        return super().write(text)


def _is_no_mode(record: logging.LogRecord) -> bool:
    """True for a record of `RERUN_LOGGER` that says more than its mode."""
    return MODE.search(record.getMessage()) is None
