"""Processes that encode chunks, and results in the order of the chunks.

Enters: chunks as they are read. Leaves: what became of them, in order.
Choices: workers are forked after the tokenizer is loaded: they share it and import nothing again.
Chunks are read only as results are taken, and no more are on the way than `AHEAD_BYTES` for each
worker, so memory does not grow with the input.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from megatron_sffn.data.text.chunks import TextChunk
from megatron_sffn.utils.errors import ConfigError

TASK_BYTES = 1 << 20
AHEAD_BYTES = 4 << 20

# What a worker process runs. A global, because a task can reach nothing else of its worker, and
# sending the tokenizer with every task costs more than the task.
_encode: Callable[[Sequence[TextChunk]], Any] | None = None


def encode_in_order[Result](
    encode: Callable[[Sequence[TextChunk]], Result], chunks: Iterable[TextChunk], workers: int
) -> Generator[Result, None, None]:
    """Encode chunks on `workers` processes; one is this process.

    Raises:
        ConfigError: a worker was killed.
    """
    if workers == 1:
        yield from map(encode, bundled(chunks))
        return
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("fork"),
        initializer=_start_worker,
        initargs=(encode,),
    )
    try:
        yield from in_order(
            lambda task: pool.submit(_encode_in_worker, task).result, chunks, AHEAD_BYTES * workers
        )
    except BrokenProcessPool as error:
        raise ConfigError(
            f"one of the --workers {workers} processes was killed, most often for lack of memory; "
            "use fewer"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def in_order[Result](
    start: Callable[[list[TextChunk]], Callable[[], Result]],
    chunks: Iterable[TextChunk],
    ahead: int,
) -> Iterator[Result]:
    """Results in the order of the chunks.

    Args:
        start: begins with some chunks elsewhere; what it returns waits for the result.
        chunks: read only as results are taken.
        ahead: bytes that may be on the way.
    """
    pending: deque[tuple[int, Callable[[], Result]]] = deque()
    on_the_way = 0
    for task in bundled(chunks):
        size = sum(chunk.num_bytes for chunk in task)
        while pending and on_the_way + size > ahead:
            done, wait = pending.popleft()
            on_the_way -= done
            yield wait()
        pending.append((size, start(task)))
        on_the_way += size
    while pending:
        yield pending.popleft()[1]()


def bundled(chunks: Iterable[TextChunk]) -> Iterator[list[TextChunk]]:
    """Chunks in lists of about `TASK_BYTES`: small files travel together."""
    bundle: list[TextChunk] = []
    size = 0
    for chunk in chunks:
        bundle.append(chunk)
        size += chunk.num_bytes
        if size >= TASK_BYTES:
            yield bundle
            bundle, size = [], 0
    if bundle:
        yield bundle


def _start_worker(encode: Callable[[Sequence[TextChunk]], Any]) -> None:
    global _encode
    _encode = encode
    # Ctrl-C reaches every process; the main one ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    # Workers of a killed process would wait for tasks for ever.
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_in_worker(chunks: Sequence[TextChunk]) -> Any:
    assert _encode is not None
    return _encode(chunks)
