"""Statistics of data sets: document lengths, counts of ids, and random samples.

Inputs: indices of `.bin/.idx` pairs, taken as one corpus.
Outputs: exact counts over all documents and ids, and some documents drawn at random.

Design notes:
- In memory are a piece of a file, a count for each length that occurs (T tokens have fewer than
  sqrt(2 T) different lengths), and a count for each id.
- An id of `LARGEST_VOCABULARY` or more shows that the `.bin` file belongs to another index.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
from numpy.typing import NDArray

from megatron_sffn.data.indexed.format import PIECE, Index, pieces
from megatron_sffn.utils.errors import ConfigError

LARGEST_VOCABULARY = 1 << 24

Counts = NDArray[numpy.int64]


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """The distribution of document lengths.

    Args:
        values: `[n]`, lengths that occur, ascending, in tokens.
        counts: `[n]`, number of documents of each length.
    """

    values: Counts
    counts: Counts

    @property
    def documents(self) -> int:
        """Number of documents."""
        return int(self.counts.sum())

    @property
    def tokens(self) -> int:
        """Number of tokens of all documents."""
        return int(self.values @ self.counts)

    @property
    def median(self) -> float:
        """Median length."""
        ranks = numpy.cumsum(self.counts)
        middle = ((self.documents - 1) // 2, self.documents // 2)
        return float(self.values[numpy.searchsorted(ranks, middle, side="right")].mean())

    def bins(self) -> list[dict[str, int]]:
        """Documents and tokens for lengths from one power of 2 to the next; 0 has its own bin."""
        # frexp returns the exponent of the next power of 2, and 0 for 0.
        _, exponents = numpy.frexp(self.values.astype(numpy.float64))
        return [
            {
                "from": 2 ** (exponent - 1) if exponent else 0,
                "to": 2**exponent - 1,
                "documents": int(self.counts[exponents == exponent].sum()),
                "tokens": int((self.values * self.counts)[exponents == exponent].sum()),
            }
            for exponent in range(int(exponents[0]), int(exponents[-1]) + 1)
        ]


def document_lengths(indices: Sequence[Index]) -> Lengths:
    """The lengths of all documents.

    Raises:
        ConfigError: the data sets have no tokens.
    """
    values, counts = numpy.empty(0, numpy.int64), numpy.empty(0, numpy.int64)
    for index in indices:
        for piece in pieces(index.num_documents):
            piece_values, piece_counts = numpy.unique(
                numpy.diff(index.offsets(piece.start, piece.stop)), return_counts=True
            )
            merged_values, positions = numpy.unique(
                numpy.concatenate([values, piece_values]), return_inverse=True
            )
            merged_counts = numpy.zeros(len(merged_values), numpy.int64)
            numpy.add.at(merged_counts, positions, numpy.concatenate([counts, piece_counts]))
            values, counts = merged_values, merged_counts
    if not values.any():
        raise ConfigError(
            f"data set {indices[0].prefix} holds {counts.sum()} documents and no tokens, which "
            "cannot be read; make it again, of text"
        )
    return Lengths(values=values, counts=counts)


def id_counts(indices: Sequence[Index], progress: Callable[[int], None]) -> Counts:
    """The number of occurrences of each id, up to the largest.

    Args:
        indices: indices of the data sets.
        progress: receives the number of bytes of each piece that has been read.

    Raises:
        ConfigError: an id is negative, or too large for a vocabulary.
    """
    counts = numpy.zeros(0, numpy.int64)
    for index in indices:
        for ids in _read_ids(index):
            smallest, largest = int(ids.min()), int(ids.max())
            if smallest < 0 or largest >= LARGEST_VOCABULARY:
                wrong = smallest if smallest < 0 else largest
                raise ConfigError(
                    f"data set {index.bin} holds the id {wrong}, which no vocabulary has; the file "
                    "is damaged or belongs to another index: make it again with "
                    "tools/preprocess_data.py"
                )
            piece_counts = numpy.bincount(ids, minlength=len(counts))
            piece_counts[: len(counts)] += counts
            counts = piece_counts
            progress(ids.nbytes)
    return counts


def _read_ids(index: Index) -> Iterator[NDArray[Any]]:
    with open(index.bin, "rb") as file:
        while len(ids := numpy.fromfile(file, index.dtype, PIECE)):
            yield ids


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A sampled document.

    Args:
        prefix: prefix of its data set.
        number: number in the data set, from 0.
        ids: the first ids.
        length: number of all ids.
    """

    prefix: str
    number: int
    ids: list[int]
    length: int


def samples(indices: Sequence[Index], count: int, seed: int, most: int) -> list[Sample]:
    """Draw documents at random without replacement, in the order of the data sets.

    Args:
        indices: indices of the data sets.
        count: number of documents; all documents, if there are fewer.
        seed: seed of the random numbers.
        most: most ids of each document.
    """
    total = sum(index.num_documents for index in indices)
    drawn_numbers = sorted(random.Random(seed).sample(range(total), min(count, total)))
    documents = []
    for index in indices:
        numbers = [number for number in drawn_numbers if number < index.num_documents]
        documents += [_sample(index, number, most) for number in numbers]
        drawn_numbers = [number - index.num_documents for number in drawn_numbers[len(numbers) :]]
    return documents


def _sample(index: Index, number: int, most: int) -> Sample:
    start, stop = (int(offset) for offset in index.offsets(number, number + 1))
    ids = numpy.fromfile(
        index.bin, index.dtype, min(stop - start, most), offset=start * index.dtype.itemsize
    )
    return Sample(prefix=index.prefix, number=number, ids=ids.tolist(), length=stop - start)
