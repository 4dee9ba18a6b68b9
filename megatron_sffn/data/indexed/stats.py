"""What is in data sets: counts, lengths, ids, and whether the files are whole.

Enters: indices of `.bin/.idx` pairs, taken as one corpus. Leaves: exact numbers of every document
and every id; some documents, drawn at random.

Choices
- Memory holds a piece of a file at a time, a count for each length that occurs (of T tokens fewer
  than the root of 2 T can differ) and one for each id.
- An id of `LARGEST_VOCABULARY` or more is no token: the `.bin` file belongs to another index.
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
    """How many documents have how many tokens.

    Args:
        values: `[n]`, lengths that occur, in rising order.
        counts: `[n]`, documents of each.
    """

    values: Counts
    counts: Counts

    @property
    def documents(self) -> int:
        """Their number."""
        return int(self.counts.sum())

    @property
    def tokens(self) -> int:
        """Tokens of all documents."""
        return int(self.values @ self.counts)

    @property
    def median(self) -> float:
        """Half of the documents are not longer, half not shorter."""
        ranks = numpy.cumsum(self.counts)
        middle = ((self.documents - 1) // 2, self.documents // 2)
        return float(self.values[numpy.searchsorted(ranks, middle, side="right")].mean())

    def bins(self) -> list[dict[str, int]]:
        """Documents and tokens of lengths from one power of 2 to the next; 0 is on its own."""
        # frexp: the exponent of the next power of 2, and 0 of 0.
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
    """Tokens of every document.

    Raises:
        ConfigError: there is no token.
    """
    values, counts = numpy.empty(0, numpy.int64), numpy.empty(0, numpy.int64)
    for index in indices:
        for piece in pieces(index.num_documents):
            more, numbers = numpy.unique(
                numpy.diff(index.offsets(piece.start, piece.stop)), return_counts=True
            )
            both, places = numpy.unique(numpy.concatenate([values, more]), return_inverse=True)
            sums = numpy.zeros(len(both), numpy.int64)
            numpy.add.at(sums, places, numpy.concatenate([counts, numbers]))
            values, counts = both, sums
    if not values.any():
        raise ConfigError(
            f"data set {indices[0].prefix} holds {counts.sum()} documents and no tokens, which "
            "cannot be read; make it again, of text"
        )
    return Lengths(values=values, counts=counts)


def id_counts(indices: Sequence[Index], progress: Callable[[int], None]) -> Counts:
    """How often each id occurs, up to the largest.

    Args:
        indices: of the sets.
        progress: told the number of bytes of each piece that is read.

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
            more = numpy.bincount(ids, minlength=len(counts))
            more[: len(counts)] += counts
            counts = more
            progress(ids.nbytes)
    return counts


def _read_ids(index: Index) -> Iterator[NDArray[Any]]:
    with open(index.bin, "rb") as file:
        while len(ids := numpy.fromfile(file, index.dtype, PIECE)):
            yield ids


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A document.

    Args:
        prefix: of its data set.
        number: in the data set, from 0.
        ids: the first of them.
        length: number of all.
    """

    prefix: str
    number: int
    ids: list[int]
    length: int


def samples(indices: Sequence[Index], count: int, seed: int, most: int) -> list[Sample]:
    """Documents drawn at random, each at most once, in the order of the sets.

    Args:
        indices: of the sets.
        count: of documents; all of them, where there are fewer.
        seed: another one draws others.
        most: ids of each.
    """
    total = sum(index.num_documents for index in indices)
    chosen = sorted(random.Random(seed).sample(range(total), min(count, total)))
    drawn = []
    for index in indices:
        own = [number for number in chosen if number < index.num_documents]
        drawn += [_sample(index, number, most) for number in own]
        chosen = [number - index.num_documents for number in chosen[len(own) :]]
    return drawn


def _sample(index: Index, number: int, most: int) -> Sample:
    start, stop = (int(offset) for offset in index.offsets(number, number + 1))
    ids = numpy.fromfile(
        index.bin, index.dtype, min(stop - start, most), offset=start * index.dtype.itemsize
    )
    return Sample(prefix=index.prefix, number=number, ids=ids.tolist(), length=stop - start)
