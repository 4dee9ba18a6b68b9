"""Index files of a data set that was since made anew under the same name.

Inputs: the index files, and the data set as it is now. Outputs: whether they belong together.

Design notes:
- Sample `i` starts at token `i * sequence_length` of the documents in the order of the index. So an
  index belongs to a data set if that holds for all samples with the lengths of its documents:
  nothing has to be noted, and copies of either are as good as the originals.
- That is one pass over both, which is made only if the data set is the newer file, or was renamed
  or copied since.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

PIECE = 1 << 22
"""Documents that are looked at a time."""


def is_newer(data: Path, index: Path) -> bool:
    """Whether a data set was written, renamed or copied after its index."""
    entry = os.stat(data)
    return max(entry.st_mtime_ns, entry.st_ctime_ns) >= os.stat(index).st_mtime_ns


def belongs(
    documents: NDArray[Any],
    samples: NDArray[Any],
    lengths: NDArray[Any],
    sequence_length: int,
) -> bool:
    """Whether samples start where the lengths of the documents say.

    Args:
        documents: `[d]`, numbers of documents in the order in which they are read.
        samples: `[n, 2]`, the place in `documents` and the token of it where each sample starts.
        lengths: of each document, in tokens.
        sequence_length: of a sample.
    """
    before = 0  # tokens
    first = 0  # sample
    for start in range(0, len(documents), PIECE):
        numbers = documents[start : start + PIECE]
        if numbers.max() >= len(lengths):
            return False
        ends = before + numpy.cumsum(lengths[numbers], dtype=numpy.int64)
        starts = numpy.concatenate([[before], ends[:-1]])
        last = first + int(numpy.searchsorted(samples[first:, 0], start + len(numbers)))
        places, offsets = samples[first:last, 0] - start, samples[first:last, 1]
        tokens = starts[places] + offsets
        expected = numpy.arange(first, last, dtype=numpy.int64) * sequence_length
        if not numpy.array_equal(tokens, expected) or (tokens > ends[places]).any():
            return False
        before, first = int(ends[-1]), last
    return first == len(samples)
