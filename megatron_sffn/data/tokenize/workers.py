"""Worker processes that encode chunks, with results in the order of the chunks.

Design notes:
- Workers are forked after the tokenizer is loaded, so they share it and import nothing again.
- Chunks are read only as results are consumed, and at most `AHEAD_BYTES` for each worker are in
  flight, so memory does not grow with the input.
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

# The function that a worker process runs. It is global because a task can reach only globals, and
# sending the tokenizer with every task would cost more than the task.
_encode: Callable[[Sequence[TextChunk]], Any] | None = None


def encode_in_order[Result](
    encode: Callable[[Sequence[TextChunk]], Result], chunks: Iterable[TextChunk], workers: int
) -> Generator[Result, None, None]:
    """Encode chunks on `workers` processes; a single worker is this process.

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
        start: starts to encode some chunks; the function that it returns waits for the result.
        chunks: the input, read only as results are consumed.
        ahead: bytes that may be in flight.
    """
    pending: deque[tuple[int, Callable[[], Result]]] = deque()
    in_flight = 0
    for task in bundled(chunks):
        size = sum(chunk.num_bytes for chunk in task)
        while pending and in_flight + size > ahead:
            size_done, wait = pending.popleft()
            in_flight -= size_done
            yield wait()
        pending.append((size, start(task)))
        in_flight += size
    while pending:
        yield pending.popleft()[1]()


def bundled(chunks: Iterable[TextChunk]) -> Iterator[list[TextChunk]]:
    """Group chunks into tasks of about `TASK_BYTES`: small files share a task."""
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
    # Ctrl-C reaches every process; the main process stops the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    # Without this, the workers of a killed process would wait for tasks forever.
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_in_worker(chunks: Sequence[TextChunk]) -> Any:
    assert _encode is not None
    return _encode(chunks)
