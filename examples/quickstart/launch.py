"""A run as a process: start it, show where it is, and stop it so that it can continue.

Enters: a command, and the file for what it prints. Leaves: that file, one line of progress on the
terminal, and an exception if the run failed or was interrupted.

Choice: the process writes to the file itself, and this one reads it: a run does not depend on the
terminal. torchrun gets a session of its own, because a second SIGINT (Ctrl-C reaches the whole
foreground group) would make it leave before its ranks have saved; here it gets exactly one.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import psutil

POLL_SECONDS = 0.5
LINE_SECONDS = 10.0
"""Between two lines of progress where a line cannot be replaced."""
STOP_SECONDS = 120
"""For the last step, an evaluation and a checkpoint, on a slow machine."""
QUOTED_LINES = 25

STEP = re.compile(
    r"iteration +(?P<iteration>\d+)/ *(?P<total>\d+) \|.*?"
    r"elapsed time per iteration \(ms\): (?P<milliseconds>[\d.]+) \|.*?"
    r"lm loss: (?P<loss>[-+.\dEeinfa]+) \|"
)
EVALUATION = re.compile(
    r"validation\S* loss at iteration (?P<iteration>\d+)\b.*?lm loss PPL: (?P<perplexity>[-+.\dE]+)"
)
PHASES = (
    # Megatron switches its checks off for an evaluation, and says no more before its end.
    (re.compile(r"RerunMode\.DISABLED"), "evaluating"),
    (re.compile(r"Evaluating iter (\d+/\d+)"), r"evaluating \1"),
    (re.compile(r"saving checkpoint at iteration"), "saving"),
    (re.compile(r"successfully saved checkpoint|RerunMode\.VALIDATE_RESULTS"), ""),
)
"""What a line says about what follows it."""
# torchrun's own account of a failure follows the traceback of the rank that failed.
LAUNCHER_FAILED = re.compile(r"^[EW]\d{4} .*torch/distributed/elastic/", re.MULTILINE)


class RunFailedError(RuntimeError):
    """A run ended without a result; the message quotes the end of its log."""


@dataclass
class Status:
    """What a run's log has said so far; 0 and None where it has said nothing yet."""

    iteration: int = 0
    total: int = 0
    milliseconds: float = 0.0
    loss: float | None = None
    evaluated_at: int = 0
    perplexity: float | None = None
    phase: str = ""

    def read(self, line: str) -> None:
        """Take in one line of the log."""
        if found := STEP.search(line):
            self.iteration, self.total = int(found["iteration"]), int(found["total"])
            self.milliseconds, self.loss = float(found["milliseconds"]), float(found["loss"])
            self.phase = ""
        elif found := EVALUATION.search(line):
            self.evaluated_at = int(found["iteration"])
            self.perplexity = float(found["perplexity"])
        for pattern, phase in PHASES:
            if found := pattern.search(line):
                self.phase = found.expand(phase)

    def __str__(self) -> str:
        """One line for the terminal."""
        parts = []
        if self.loss is not None:
            left = (self.total - self.iteration) * self.milliseconds / 1000
            parts = [
                f"iteration {self.iteration}/{self.total}",
                f"loss {self.loss:.3f}",
                f"{self.milliseconds:.0f} ms per iteration",
                f"ETA {clock(left)}",
            ]
        if self.perplexity is not None:
            parts.append(f"held-out perplexity {self.perplexity:.1f} at {self.evaluated_at}")
        return ", ".join([*parts, self.phase] if self.phase else parts) or "starting the ranks"


class Display:
    """One line of progress: replaced in place on a terminal, else repeated now and then.

    Args:
        prefix: begins every line.
        stream: to write to.
    """

    def __init__(self, prefix: str, stream: TextIO) -> None:
        self._prefix, self._stream, self._live = prefix, stream, stream.isatty()
        self._start = self._shown_at = time.monotonic()
        self._text = ""

    def show(self, status: object, *, now: bool = False) -> None:
        """Show a status; `now`: whatever the time."""
        elapsed = time.monotonic() - self._start
        text = f"{self._prefix} {clock(elapsed)} | {status}"
        if text == self._text:
            return
        if self._live:
            # A terminal may say that it has 0 columns.
            width = os.get_terminal_size(self._stream.fileno()).columns or 80
            self._stream.write(f"\r\033[K{text[: width - 1]}")
            self._stream.flush()
        elif now or time.monotonic() - self._shown_at >= LINE_SECONDS:
            self._shown_at = time.monotonic()
            print(text, file=self._stream, flush=True)
        else:
            return
        self._text = text

    def end(self) -> None:
        """Leave the last status on the terminal."""
        if self._live:
            print(file=self._stream, flush=True)


def clock(seconds: float) -> str:
    """Seconds as minutes and seconds: 2:05."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def launch(command: Sequence[str], log: Path, *, title: str, stream: TextIO = sys.stderr) -> None:
    """Run a training command to its end.

    Args:
        command: of torchrun.
        log: file that gets what the command prints, behind what it holds already.
        title: of the run, for the terminal.
        stream: the terminal.

    Raises:
        RunFailedError: if the command failed.
        KeyboardInterrupt: after the ranks have saved and ended.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    display = Display(f"  {title}", stream)
    with log.open("ab") as output:
        start = output.tell()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment(),
            start_new_session=True,
        )
    try:
        status = Status()
        display.show(status, now=True)
        for line in follow(log, start, process):
            status.read(line)
            display.show(status)
        display.show(status, now=True)
        display.end()
    except BaseException:
        stop(process, stream)
        raise
    if process.returncode:
        raise RunFailedError(
            f"the {title} run ended with exit code {process.returncode}; the end of {log}:\n"
            f"{last_lines(log, start)}"
        )


def environment() -> dict[str, str]:
    """The environment of a run: the same on every machine, with or without GPUs."""
    return {
        **os.environ,
        # Each rank has one core's worth of work; more threads would fight over the two.
        "OMP_NUM_THREADS": "1",
        # Two ranks of NCCL need two GPUs.
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONUNBUFFERED": "1",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(STOP_SECONDS),
    }


def follow(log: Path, start: int, process: subprocess.Popen[bytes]) -> Iterator[str]:
    """The lines that a process adds to a file; an empty one while there is nothing new."""
    with log.open("rb") as file:
        file.seek(start)
        rest = b""
        ended = False
        while not ended:
            ended = process.poll() is not None
            *lines, rest = (rest + file.read()).split(b"\n")
            for line in lines:
                yield line.decode(errors="replace")
            yield ""
            if not ended:
                time.sleep(POLL_SECONDS)


def stop(process: subprocess.Popen[bytes], stream: TextIO) -> None:
    """End a run as Ctrl-C should: it saves after its step; a second Ctrl-C ends it at once."""
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGINT)
    # The terminal may be gone; the run must be stopped all the same.
    with contextlib.suppress(OSError):
        print("\n  stopping after this step; again to stop at once", file=stream, flush=True)
    try:
        process.wait(STOP_SECONDS + 10)
    except (KeyboardInterrupt, subprocess.TimeoutExpired):
        # The ranks have sessions of their own: ending torchrun alone would leave them behind.
        family = [*psutil.Process(process.pid).children(recursive=True), process]
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        process.wait()


def last_lines(log: Path, start: int) -> str:
    """The end of what a failed run printed, without torchrun's own account."""
    with log.open("rb") as file:
        file.seek(start)
        text = file.read().decode(errors="replace")
    said = LAUNCHER_FAILED.split(text, maxsplit=1)[0].splitlines()
    return "\n".join(said[-QUOTED_LINES:])
