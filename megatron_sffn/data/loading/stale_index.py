"""Detects stale index files, whose data set was written again under the same name.

Design notes:
- Sample `i` starts at token `i * sequence_length` of the documents in the order of the index. An
  index belongs to a data set if this holds for all samples with the lengths of its documents. So no
  extra record is needed, and copies of index or data set are valid.
- The check is one pass over both. It is made only if the data set is newer than the index, or was
  renamed or copied later.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

PIECE = 1 << 22
"""Documents in memory at once."""


def is_newer(data: Path, index: Path) -> bool:
    """True if a data set was written, renamed or copied after its index."""
    entry = os.stat(data)
    return max(entry.st_mtime_ns, entry.st_ctime_ns) >= os.stat(index).st_mtime_ns


def belongs(
    documents: NDArray[Any],
    samples: NDArray[Any],
    lengths: NDArray[Any],
    sequence_length: int,
) -> bool:
    """True if all samples start where the lengths of the documents say.

    Args:
        documents: `[d]`, document numbers in the order of the index.
        samples: `[n, 2]`, start of each sample: position in `documents`, and token of the document.
        lengths: length of each document, in tokens.
        sequence_length: tokens of a sample.
    """
    tokens_before = 0
    first = 0  # first sample of the piece
    for start in range(0, len(documents), PIECE):
        numbers = documents[start : start + PIECE]
        if numbers.max() >= len(lengths):
            return False
        ends = tokens_before + numpy.cumsum(lengths[numbers], dtype=numpy.int64)
        starts = numpy.concatenate([[tokens_before], ends[:-1]])
        last = first + int(numpy.searchsorted(samples[first:, 0], start + len(numbers)))
        positions, offsets = samples[first:last, 0] - start, samples[first:last, 1]
        tokens = starts[positions] + offsets
        expected = numpy.arange(first, last, dtype=numpy.int64) * sequence_length
        if not numpy.array_equal(tokens, expected) or (tokens > ends[positions]).any():
            return False
        tokens_before, first = int(ends[-1]), last
    return first == len(samples)
