"""How far a run over documents is, on stderr.

Enters: counts as they grow. Leaves: a line every so many documents, and no more than one a second.
Choice: the time that is left is by bytes on disk, which are known of compressed files, too.
"""

from __future__ import annotations

import sys
import time

from megatron_sffn.data.output.meter import clock, size
from megatron_sffn.data.output.run_state import State

SECONDS = 1.0


class Progress:
    """Lines of progress of one run.

    Args:
        total: bytes on disk; None if that is not known.
        interval: documents between two lines.
        start: where the run begins.
    """

    def __init__(self, total: int | None, interval: int, start: State) -> None:
        self._total, self._interval = total, interval
        self._before, self._documents = start, start.documents
        self._start, self._printed = time.monotonic(), float("-inf")

    @property
    def seconds(self) -> float:
        """Time of this run."""
        return max(time.monotonic() - self._start, 1e-6)

    def update(self, state: State) -> None:
        """Take note of how far the run is."""
        full = state.documents // self._interval > self._documents // self._interval
        if not full or time.monotonic() < self._printed + SECONDS:
            return
        self._documents, self._printed = state.documents, time.monotonic()
        rate = (state.num_bytes - self._before.num_bytes) / self.seconds
        line = (
            f"processed {state.documents} documents, {size(state.num_bytes)} "
            f"({rate / 1e6:.1f} MB/s), {sum(state.tokens) / 1e6:.2f} M tokens"
        )
        if self._total is not None:
            speed = max(state.consumed - self._before.consumed, 1) / self.seconds
            left = clock((self._total - state.consumed) / speed)
            line += f", {state.consumed / max(self._total, 1):.0%}, ETA {left}"
        print(line, file=sys.stderr, flush=True)
