"""The watchdog: when a rank hangs, a line names the rank that the others wait for.

Inputs: Megatron's namespace, and the progress of this rank. Outputs: the line on stderr, before the
collective operation times out.

Design notes: a collective that times out names the operation, not the rank that is missing. So each
rank has a thread that watches its own progress. A rank without progress for most of the timeout
says where it is in the store of the process group. Ranks that say nothing are stopped or dead. If
all of them answer, their places in the code tell which one does not wait.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from argparse import Namespace
from collections import defaultdict
from typing import Any

import torch
from torch.distributed.distributed_c10d import _get_default_store

PATIENCE, ANSWERS = 3 / 4, 1 / 16
"""Fractions of the timeout: how long a rank waits for progress, and then for other ranks' answers.
"""

SHOWN = 8
"""Ranks that a line lists at most."""


class Watchdog:
    """Names the rank that the other ranks wait for.

    Args:
        args: Megatron's namespace.
    """

    def __init__(self, args: Namespace) -> None:
        self.args = args
        self._first_iteration: int | None = None
        self._progress = (0, time.monotonic())
        self._main_thread = threading.get_ident()

    def note(self, iteration: int) -> None:
        """Note that this rank begins a microbatch; the first call starts the thread."""
        if self._first_iteration is None:
            self._first_iteration = iteration
            rank = torch.distributed.get_rank()
            # A second connection, since the main thread may hold the first one.
            store: Any = _get_default_store()
            store = store.clone()
            store.set(f"rank {rank}", f"{socket.gethostname()}, process {os.getpid()}")
            threading.Thread(target=self._run, args=(store, rank), daemon=True).start()
        self._progress = (iteration, time.monotonic())

    @property
    def timeout(self) -> float:
        """Timeout of the collectives in seconds; after the first step it may be another one."""
        timeout_after_init = self.args.distributed_timeout_seconds_after_init
        if timeout_after_init is not None and self._progress[0] != self._first_iteration:
            return float(timeout_after_init)
        return 60.0 * self.args.distributed_timeout_minutes

    def _run(self, store: torch.distributed.Store, rank: int) -> None:
        """Sleep until there is no progress for too long; then report it, once."""
        while (waited := time.monotonic() - self._progress[1]) < PATIENCE * self.timeout:
            time.sleep(min(PATIENCE * self.timeout - waited, 1.0))
        query = threading.Thread(target=self._query_ranks, args=(store, rank), daemon=True)
        query.start()
        query.join(2 * ANSWERS * self.timeout)
        if query.is_alive():
            self._print(
                "the store does not answer: rank 0, or the launcher that holds it, is stopped, "
                "dead or cut off"
            )

    def _query_ranks(self, store: torch.distributed.Store, rank: int) -> None:
        """Store where this rank is; the first rank to do so waits for the others, and reports."""
        store.set(f"place {rank}", self._place())
        if store.add("stalled", 1) == 1:
            time.sleep(ANSWERS * self.timeout)
            self._print(report(store, torch.distributed.get_world_size()))

    def _print(self, cause: str) -> None:
        iteration, last_progress = self._progress
        seconds = time.monotonic() - last_progress
        line = f"no progress for {seconds:.0f} s in step {iteration + 1}: {cause}"
        print(line, file=sys.stderr, flush=True)

    def _place(self) -> str:
        """The line of code at which the main thread is."""
        frame = sys._current_frames()[self._main_thread]
        return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"


def report(store: torch.distributed.Store, num_ranks: int) -> str:
    """A sentence that names the rank that hangs, by the answers in the store.

    Args:
        store: has `rank N` for every rank, and `place N` for each rank that answered.
        num_ranks: ranks of the job.
    """
    silent, places = [], defaultdict(list)
    for rank in range(num_ranks):
        if store.check([f"place {rank}"]):
            places[store.get(f"place {rank}").decode()].append(rank)
        else:
            silent.append(rank)
    if silent:
        names = "; ".join(f"rank {r} ({store.get(f'rank {r}').decode()})" for r in silent[:SHOWN])
        omitted = f" and {len(silent) - SHOWN} more" if len(silent) > SHOWN else ""
        return f"{names}{omitted} does not answer: stopped, dead or cut off; the others wait for it"
    listed = "; ".join(
        f"{_ranks(ranks)} at {place}"
        for place, ranks in sorted(places.items(), key=lambda item: len(item[1]))[:SHOWN]
    )
    return f"all ranks answer: {listed}"


def _ranks(ranks: list[int]) -> str:
    """Ranks as part of a sentence: their numbers, or how many there are."""
    if len(ranks) > SHOWN:
        return f"{len(ranks)} ranks"
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
