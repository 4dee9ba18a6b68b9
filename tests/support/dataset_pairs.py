"""Data sets for tests, written by Megatron's own builder."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Megatron warns about every missing accelerator library
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder


def write_pair(
    prefix: Path, documents: Iterable[Sequence[Sequence[int]]], dtype: Any = numpy.uint16
) -> str:
    """A data set of documents, each a list of sequences of ids; returns its prefix."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for sequences in documents:
        ids = [token for sequence in sequences for token in sequence]
        builder.add_document(
            numpy.array(ids, dtype=dtype), [len(sequence) for sequence in sequences]
        )
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def random_documents(count: int, *, seed: int = 0, vocab: int = 100) -> list[list[list[int]]]:
    """Documents of none to three sequences."""
    rng = numpy.random.default_rng(seed)
    return [
        [rng.integers(0, vocab, rng.integers(1, 30)).tolist() for _ in range(rng.integers(0, 4))]
        for _ in range(count)
    ]


def merged_by_megatron(prefix: Path, prefixes: Sequence[str], dtype: Any = numpy.uint16) -> str:
    """Merge data sets with `IndexedDatasetBuilder.add_index`; returns the new prefix."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RANK", "0")  # Megatron's logging warns if it does not know the rank
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
        for source in prefixes:
            builder.add_index(source)
        builder.finalize(f"{prefix}.idx")
    return str(prefix)


def content(prefix: str | Path) -> dict[str, bytes]:
    """The bytes of the two files of a data set."""
    return {ending: Path(f"{prefix}{ending}").read_bytes() for ending in (".bin", ".idx")}
