"""Wait for processes that a test has started, and end them."""

from __future__ import annotations

import contextlib
import random
import socket
import subprocess
import time
from collections.abc import Callable

import psutil

HANGS = 900.0
"""Seconds after which a wait counts as a hang. It is no deadline: the slowest wait takes a minute
on two free cores, and ten times as long on shared ones."""


def free_port() -> int:
    """A port for the ranks of a run.

    It lies outside the range from which the system gives ports to connections, so that no
    connection takes it before the ranks do.
    """
    while True:
        port = random.SystemRandom().randrange(15_000, 32_000)
        with contextlib.suppress(OSError), socket.socket() as listener:
            listener.bind(("127.0.0.1", port))
            return port


def wait_until(done: Callable[[], bool], seconds: float, log: Callable[[], str]) -> None:
    """Wait until `done()` is true.

    Raises:
        AssertionError: with the end of a log, after `seconds`.
    """
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, f"not within {seconds} s:\n{log()[-3000:]}"
        time.sleep(0.005)


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """End a launcher and its ranks, which have sessions of their own."""
    if process.poll() is None:
        for member in [*psutil.Process(process.pid).children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):  # the process has just ended
                member.kill()
        process.wait()
