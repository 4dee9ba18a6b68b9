"""How far a long pass over data is, on stderr.

Enters: bytes as they are done. Leaves: a line every `SECONDS`, with rate and time left.
"""

from __future__ import annotations

import sys
import time

SECONDS = 5.0


def say(message: str) -> None:
    """A line on stderr."""
    print(message, file=sys.stderr, flush=True)


class Meter:
    """Lines of progress.

    Args:
        verb: what is done with the bytes: `copied`.
        total: bytes in all; None if that is not known.
    """

    def __init__(self, verb: str, total: int | None) -> None:
        self._verb, self._total = verb, total
        self._start = self._printed = time.monotonic()
        self._done = 0

    def add(self, num_bytes: int) -> None:
        """Count bytes that are done."""
        self.reach(self._done + num_bytes)

    def reach(self, done: int) -> None:
        """Set the number of bytes that are done."""
        self._done = done
        now = time.monotonic()
        if now - self._printed >= SECONDS:
            self._printed = now
            print(self._line(now - self._start), file=sys.stderr, flush=True)

    def end(self) -> str:
        """What was done, in how much time: `copied 4.3 GB in 3.2 s (1343.8 MB/s)`."""
        seconds = time.monotonic() - self._start
        rate = self._done / max(seconds, 1e-6)
        return f"{self._verb} {size(self._done)} in {seconds:.1f} s ({rate / 1e6:.1f} MB/s)"

    def _line(self, seconds: float) -> str:
        rate = self._done / seconds
        speed = f"{rate / 1e6:.1f} MB/s"
        if self._total is None:
            return f"{self._verb} {size(self._done)}, {speed}"
        left = (self._total - self._done) / max(rate, 1.0)
        share = self._done / max(self._total, 1)
        return (
            f"{self._verb} {size(self._done)} of {size(self._total)} ({share:.0%}), {speed}, "
            f"ETA {clock(left)}"
        )


def size(num_bytes: int) -> str:
    """Bytes as a person reads them."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{num_bytes / 1e3:.1f} kB"


def clock(seconds: float) -> str:
    """Seconds as `1:02:03`."""
    whole = max(0, round(seconds))
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
