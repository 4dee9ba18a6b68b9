"""Workers give results in the order of the chunks, and read few chunks ahead."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence

import pytest

from megatron_sffn.data.text.chunks import Position, TextChunk
from megatron_sffn.data.text.sources import Source
from megatron_sffn.data.tokenize import workers
from megatron_sffn.data.tokenize.workers import bundled, encode_in_order
from megatron_sffn.utils.errors import ConfigError

# Other tests may have left threads running; the workers of these tests do not use them.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

SOURCE = Source(path="a", kind="lines", compression="", size=None, modified=0)


@pytest.fixture(autouse=True)
def small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "TASK_BYTES", 10)
    monkeypatch.setattr(workers, "AHEAD_BYTES", 40)


def chunks_of(sizes: Sequence[int], read_numbers: list[int]) -> Iterator[TextChunk]:
    for number, size in enumerate(sizes, start=1):
        read_numbers.append(number)
        content, end = b"x" * size, Position(number=number)
        yield TextChunk(source=SOURCE, number=number, content=content, end=end, consumed=0)


def encode_numbers(chunks: Sequence[TextChunk]) -> list[int]:
    """Stands in for an encoder: odd chunks take longer."""
    time.sleep(0.02 if chunks[0].number % 2 else 0)
    return [chunk.number for chunk in chunks]


def test_results_keep_the_order_and_nothing_is_read_too_early() -> None:
    read_numbers: list[int] = []
    results = encode_in_order(encode_numbers, chunks_of([10] * 12, read_numbers), workers=2)
    numbers = [next(results)]
    assert len(read_numbers) == 9  # eight in flight, and one that waits for the first
    numbers += results
    assert numbers == [[number] for number in range(1, 13)]


def test_a_long_chunk_is_encoded_alone() -> None:
    read_numbers: list[int] = []
    results = encode_in_order(encode_numbers, chunks_of([1000] * 5, read_numbers), workers=2)
    for number in range(1, 5):
        assert next(results) == [number]
        assert len(read_numbers) == number + 1
    assert list(results) == [[5]]


def test_small_chunks_share_a_task() -> None:
    tasks = [len(task) for task in bundled(chunks_of([3, 3, 3, 3, 30, 0, 10, 0, 0], []))]
    assert tasks == [4, 1, 2, 2]


@pytest.mark.parametrize("processes", [1, 2, 7])
def test_results_do_not_depend_on_the_number_of_workers(processes: int) -> None:
    results = encode_in_order(encode_numbers, chunks_of([4] * 30, []), processes)
    assert [number for result in results for number in result] == list(range(1, 31))
    assert list(encode_in_order(encode_numbers, chunks_of([], []), processes)) == []


def test_an_error_in_a_worker_is_raised() -> None:
    def encode(chunks: Sequence[TextChunk]) -> None:
        raise ConfigError(f"chunk {chunks[0].number} is bad")

    with pytest.raises(ConfigError, match="chunk 1 is bad"):
        list(encode_in_order(encode, chunks_of([10] * 9, []), workers=2))


def test_a_killed_worker_is_reported_in_one_sentence() -> None:
    def encode_or_die(chunks: Sequence[TextChunk]) -> list[int]:
        if chunks[0].number == 13:
            os._exit(1)
        return encode_numbers(chunks)

    results = encode_in_order(encode_or_die, chunks_of([10] * 13, []), workers=2)
    with pytest.raises(
        ConfigError, match=r"one of the --workers 2 processes was killed, .*; use f"
    ):
        list(results)
