"""Starts runs as processes, shows their progress, and stops them so that they can resume.

Inputs: a command, and a log file. Outputs: the log, a line of progress on the terminal, and an
exception if the run failed or was interrupted.

Design notes: the process writes its log itself, and this module reads it, so that a run does not
depend on the terminal. torchrun gets its own session, because Ctrl-C sends SIGINT to the whole
foreground group, and a second SIGINT would end torchrun before its ranks have saved.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

import psutil

from megatron_sffn.train.log_status import Status, clock

POLL_SECONDS = 0.5
LINE_SECONDS = 10.0
"""Seconds between two lines of progress if a line cannot be replaced."""
STOP_SECONDS = 120
"""Time for the last step, an evaluation and a checkpoint on a slow machine."""
QUOTED_LINES = 25

# torchrun's report of a failure follows the traceback of the rank that failed.
LAUNCHER_FAILED = re.compile(r"^[EW]\d{4} .*torch/distributed/elastic/", re.MULTILINE)


class RunFailedError(RuntimeError):
    """A run ended without a result; the message quotes the end of its log."""


class Display:
    """Shows progress: one line that is replaced on a terminal, else new lines from time to time.

    Args:
        prefix: beginning of every line.
        stream: the stream to write to.
    """

    def __init__(self, prefix: str, stream: TextIO) -> None:
        self._prefix, self._stream, self._live = prefix, stream, stream.isatty()
        self._start = self._shown_at = time.monotonic()
        self._text = ""

    def show(self, status: object, *, now: bool = False) -> None:
        """Show a status; with `now` also if the last line is recent."""
        elapsed = time.monotonic() - self._start
        text = f"{self._prefix} {clock(elapsed)} | {status}"
        if text == self._text:
            return
        if self._live:
            # Some terminals report 0 columns.
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
        """End the line, so that the last status stays on the terminal."""
        if self._live:
            print(file=self._stream, flush=True)


class TrainingProcess:
    """A training command that runs in a session of its own, and its progress by its log.

    Args:
        command: the command.
        log: file to which the output of the command is appended.
        environment: its environment variables.
        keep_open: file descriptors that the process inherits, such as a lock.
    """

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        environment: Mapping[str, str],
        *,
        keep_open: Sequence[int] = (),
    ) -> None:
        self.status = Status()
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            self._start = output.tell()
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
                pass_fds=keep_open,
            )
        self._position = self._start
        self._incomplete_line = b""

    def poll(self) -> int | None:
        """Read what the log has got since the last call; the exit code if the process has ended."""
        code = self._process.poll()
        with self.log.open("rb") as file:
            file.seek(self._position)
            *lines, self._incomplete_line = (self._incomplete_line + file.read()).split(b"\n")
            self._position = file.tell()
        for line in lines:
            self.status.read(line.decode(errors="replace"))
        return code

    def last_lines(self) -> str:
        """The end of the process's output, without torchrun's report of a failure."""
        with self.log.open("rb") as file:
            file.seek(self._start)
            text = file.read().decode(errors="replace")
        lines = LAUNCHER_FAILED.split(text, maxsplit=1)[0].splitlines()
        return "\n".join(lines[-QUOTED_LINES:])

    def ask_to_stop(self) -> None:
        """Let the run save a checkpoint after its step, and end."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)

    def wait_until_stopped(self) -> None:
        """Wait for the end of a run that was asked to stop; Ctrl-C or too long a wait kills it."""
        try:
            self._process.wait(STOP_SECONDS + 10)
        except (KeyboardInterrupt, subprocess.TimeoutExpired):
            self.kill()

    def kill(self) -> None:
        """End the process and its ranks at once."""
        # The ranks have their own sessions, so they would survive the end of torchrun.
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self._process.pid)
            for member in [*parent.children(recursive=True), parent]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
        self._process.wait()


def launch(
    command: Sequence[str],
    log: Path,
    environment: Mapping[str, str],
    *,
    title: str,
    stream: TextIO = sys.stderr,
) -> None:
    """Run a training command to its end, with its progress on the terminal.

    Args:
        command: the torchrun command.
        log: file to which the output of the command is appended.
        environment: environment variables of the command.
        title: title of the run on the terminal.
        stream: the terminal.

    Raises:
        RunFailedError: if the command failed.
        KeyboardInterrupt: after the ranks have saved and ended.
    """
    display = Display(f"  {title}", stream)
    process = TrainingProcess(command, log, environment)
    try:
        display.show(process.status, now=True)
        while (code := process.poll()) is None:
            display.show(process.status)
            time.sleep(POLL_SECONDS)
        display.show(process.status, now=True)
        display.end()
    except BaseException:
        process.ask_to_stop()
        # The run must be stopped even if the terminal was closed.
        with contextlib.suppress(OSError):
            print("\n  stopping after this step; again to stop at once", file=stream, flush=True)
        process.wait_until_stopped()
        raise
    if code:
        raise RunFailedError(
            f"the {title} run ended with exit code {code}; the end of {log}:\n"
            f"{process.last_lines()}"
        )
