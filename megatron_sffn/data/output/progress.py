"""Progress of a long pass over data, on stderr.

Inputs: the bytes that are done. Outputs: a line every few seconds, with rate, share and time left.

Design notes:
- Share and time left count bytes on disk, whose total is also known of compressed files.
"""

from __future__ import annotations

import time

from megatron_sffn.utils.human_size import human_size
from megatron_sffn.utils.human_time import human_time
from megatron_sffn.utils.stderr import say

LINE_SECONDS = 5.0


class Progress:
    """Prints lines of progress.

    Args:
        verb: what happens to the bytes: `copied`.
        total: all bytes; None if their number is unknown.
        done: bytes that an earlier run has done, which do not count for the rate.
        line_seconds: least time between two lines.
        at_once: True if the first line need not wait for `line_seconds`.
    """

    def __init__(
        self,
        verb: str,
        total: int | None,
        *,
        done: int = 0,
        line_seconds: float = LINE_SECONDS,
        at_once: bool = False,
    ) -> None:
        self._verb, self._total, self._line_seconds = verb, total, line_seconds
        self._done_before = self._done = done
        self._start = time.monotonic()
        self._last_line = float("-inf") if at_once else self._start

    @property
    def seconds(self) -> float:
        """Time since the start, above zero."""
        return max(time.monotonic() - self._start, 1e-6)

    @property
    def is_due(self) -> bool:
        """True if the last line is old enough for another."""
        return time.monotonic() - self._last_line >= self._line_seconds

    def add(self, num_bytes: int) -> None:
        """Count bytes that are done."""
        self.reach(self._done + num_bytes)

    def reach(self, done: int) -> None:
        """Set the number of bytes that are done, and print a line if one is due."""
        self._done = done
        if self.is_due:
            of_total = "" if self._total is None else f" of {human_size(self._total)}"
            self.print(f"{human_size(done)}{of_total}, {self._rate() / 1e6:.1f} MB/s", done)

    def print(self, state: str, done: int) -> None:
        """Print a line now.

        Args:
            state: the progress in words; share and time left are added to it.
            done: bytes that are done, from which these two follow.
        """
        self._done, self._last_line = done, time.monotonic()
        line = f"{self._verb} {state}"
        if self._total is not None:
            time_left = human_time((self._total - done) / max(self._rate(), 1.0))
            line += f", {done / max(self._total, 1):.0%}, ETA {time_left}"
        say(line)

    def summary(self) -> str:
        """The work and its time: `copied 4.3 GB in 3.2 s (1343.8 MB/s)`."""
        return (
            f"{self._verb} {human_size(self._done)} in {self.seconds:.1f} s "
            f"({self._rate() / 1e6:.1f} MB/s)"
        )

    def _rate(self) -> float:
        return (self._done - self._done_before) / self.seconds
