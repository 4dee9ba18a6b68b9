"""Runs a function of this process with a pseudo-terminal as stdout."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import struct
import termios
import threading
from collections.abc import Callable
from typing import Any

READ_BYTES = 4096


def on_terminal(function: Callable[[], Any], *, columns: int) -> str:
    """Call a function whose stdout is a terminal; returns what the terminal got.

    Args:
        function: the function.
        columns: width of the terminal; some report 0.
    """
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    received: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError):  # the other side was closed
            while data := os.read(master, READ_BYTES):
                received.append(data)

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(slave, "w") as terminal, contextlib.redirect_stdout(terminal):
        function()
    reader.join()
    os.close(master)
    return b"".join(received).decode()
