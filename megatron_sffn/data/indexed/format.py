"""Megatron's `.bin/.idx` pairs, of any size: `Index` reads a `.idx` file, `IndexWriter` writes one.

Design notes:
- `PIECE` entries of an index are in memory at once, whatever the number of documents. Megatron's
  builder keeps all lengths and documents in Python lists.
- Offsets are computed from the lengths in int64 and never copied, so a data set may have any size.
- Multimodal data sets (with modes) are refused, because no other code of this package reads them.
"""

from __future__ import annotations

import os
import shutil
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from megatron_sffn.utils.errors import ConfigError

PIECE = 1 << 20
"""Entries of an index in memory at once."""
HEAD = struct.Struct("<9sQBQQ")
"""Header: magic, version, code of the dtype, number of sequences, number of documents plus one."""
MAGIC, VERSION = b"MMIDIDX\0\0", 1
DTYPES = {1: "u1", 2: "i1", 3: "i2", 4: "i4", 5: "i8", 8: "u2"}
"""Megatron's code -> type of the ids. Its own table, `DType`, takes seconds to import."""

Lengths = NDArray[numpy.int32]
Offsets = NDArray[numpy.int64]


@dataclass(frozen=True, kw_only=True)
class Index:
    """The index of a `.bin/.idx` pair.

    The arrays are memory-mapped at each access and not kept: a mapped file is an open file, and a
    corpus may have more files than a process may open.

    Args:
        prefix: path of both files without the ending.
        dtype: type of the ids.
        num_sequences: number of sequences.
        num_documents: number of documents.
    """

    prefix: str
    dtype: numpy.dtype[Any]
    num_sequences: int
    num_documents: int

    @property
    def bin(self) -> str:
        """Path of the ids."""
        return self.prefix + ".bin"

    @property
    def lengths(self) -> Lengths:
        """`[sequences]`, number of tokens of each."""
        return self._map("<i4", HEAD.size, self.num_sequences)

    @property
    def pointers(self) -> Offsets:
        """`[sequences]`, offset of each in the `.bin` file, in bytes."""
        return self._map("<i8", HEAD.size + 4 * self.num_sequences, self.num_sequences)

    @property
    def documents(self) -> Offsets:
        """`[documents + 1]`, first sequence of each; the last entry is the number of sequences."""
        return self._map("<i8", HEAD.size + 12 * self.num_sequences, self.num_documents + 1)

    def _map(self, dtype: str, offset: int, count: int) -> NDArray[Any]:
        if not count:
            return numpy.empty(0, dtype)
        return numpy.memmap(self.prefix + ".idx", dtype, "r", offset, (count,))

    @cached_property
    def num_bytes(self) -> int:
        """Length of the `.bin` file."""
        if not self.num_sequences:
            return 0
        return int(self.pointers[-1]) + int(self.lengths[-1]) * self.dtype.itemsize

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all sequences."""
        return self.num_bytes // self.dtype.itemsize

    def offsets(self, start: int, stop: int) -> Offsets:
        """Offsets of documents `start` to `stop` in tokens; the last may be the end of the file."""
        firsts = self.documents[start : stop + 1]
        offsets = numpy.full(len(firsts), self.num_bytes)
        inside = firsts < self.num_sequences
        offsets[inside] = self.pointers[firsts[inside]]
        return offsets // self.dtype.itemsize


def pieces(length: int) -> Iterator[slice]:
    """Slices of at most `PIECE` entries, in order."""
    for start in range(0, length, PIECE):
        yield slice(start, min(start + PIECE, length))


def open_index(prefix: str) -> Index:
    """Open a pair, and check that both files exist, are complete and belong together.

    Args:
        prefix: path without the ending.

    Raises:
        ConfigError: a file is missing, truncated, of another format, or belongs to another pair.
    """
    for ending in (".idx", ".bin"):
        if not os.path.isfile(prefix + ending):
            raise ConfigError(
                f"data set {prefix + ending} does not exist; give the path of PREFIX.bin and "
                "PREFIX.idx without the ending"
            )
    index = _read_head(prefix)
    size = os.path.getsize(index.bin)
    if size != index.num_bytes:
        raise ConfigError(
            f"data set {index.bin} has {size} bytes, but its index says {index.num_bytes}; it is "
            "truncated or belongs to another index: make it again with tools/preprocess_data.py"
        )
    return index


def _read_head(prefix: str) -> Index:
    path = prefix + ".idx"
    with open(path, "rb") as file:
        head = file.read(HEAD.size).ljust(HEAD.size, b"\0")
    magic, version, code, sequences, bounds = HEAD.unpack(head)
    remedy = "make the data set again with tools/preprocess_data.py"
    if (magic, version) != (MAGIC, VERSION) or code not in DTYPES:
        raise ConfigError(f"data set index {path} is no index; {remedy}")
    # 12 bytes for the length and offset of a sequence, 8 for the first sequence of a document.
    size, expected = os.path.getsize(path), HEAD.size + 12 * sequences + 8 * bounds
    if size == expected + sequences > expected:
        raise ConfigError(
            f"data set index {path} has a mode for each sequence, so it is multimodal; give sets "
            "of text"
        )
    if size != expected or not bounds:
        raise ConfigError(f"data set index {path} is truncated; {remedy}")
    return Index(
        prefix=prefix,
        dtype=numpy.dtype(DTYPES[code]),
        num_sequences=sequences,
        num_documents=bounds - 1,
    )


def check_index(index: Index) -> None:
    """Check every entry: sequences are contiguous, and documents consist of them.

    Raises:
        ConfigError: an entry is wrong.
    """
    lengths, pointers, documents = index.lengths, index.pointers, index.documents
    end = 0
    for piece in pieces(index.num_sequences):
        sizes = lengths[piece].astype(numpy.int64) * index.dtype.itemsize
        ends = end + numpy.cumsum(sizes)
        if (sizes < 0).any() or (pointers[piece] != ends - sizes).any():
            raise _damaged(index, "sequences do not follow each other")
        end = int(ends[-1])
    last_bound = 0
    for piece in pieces(len(documents)):
        bounds = documents[piece]
        if (numpy.diff(bounds, prepend=last_bound) < 0).any():
            raise _damaged(index, "documents are not in the order of their sequences")
        last_bound = int(bounds[-1])
    if documents[0] != 0 or last_bound != index.num_sequences:
        raise _damaged(index, "documents do not hold all sequences")


def _damaged(index: Index, fault: str) -> ConfigError:
    return ConfigError(
        f"data set index {index.prefix}.idx is damaged, its {fault}; make the data set again with "
        "tools/preprocess_data.py"
    )


class IndexWriter:
    """Writes a `.idx` file document by document.

    Args:
        dtype: type of the ids.
        folder: folder for temporary files, on a disk with room for the index twice.
    """

    def __init__(self, dtype: numpy.dtype[Any], folder: Path) -> None:
        self._dtype = dtype
        # Files without names, so that a kill does not leave them.
        self._lengths = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  (until `close`)
        self._documents = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self.num_sequences = self.num_documents = 0

    def add_sequences(self, lengths: Lengths) -> None:
        """Add sequences, with `[sequences]` lengths."""
        self._lengths.write(lengths.astype("<i4", copy=False).tobytes())
        self.num_sequences += len(lengths)

    def end_documents(self, ends: Offsets) -> None:
        """Add documents in order; `[documents]`, the sequence after the last of each."""
        self._documents.write(ends.astype("<i8", copy=False).tobytes())
        self.num_documents += len(ends)

    def finish(self, path: Path) -> None:
        """Write the file."""
        (code,) = (code for code, name in DTYPES.items() if numpy.dtype(name) == self._dtype)
        with path.open("wb") as file:
            head = (MAGIC, VERSION, code, self.num_sequences, self.num_documents + 1)
            file.write(HEAD.pack(*head))
            self._lengths.seek(0)
            shutil.copyfileobj(self._lengths, file)
            end = 0
            self._lengths.seek(0)
            while lengths := self._lengths.read(4 * PIECE):
                sizes = numpy.frombuffer(lengths, "<i4").astype("<i8") * self._dtype.itemsize
                ends = end + numpy.cumsum(sizes)
                file.write((ends - sizes).tobytes())
                end = int(ends[-1])
            file.write(bytes(8))  # the first document begins with sequence 0
            self._documents.seek(0)
            shutil.copyfileobj(self._documents, file)
        self.close()

    def close(self) -> None:
        """Discard an unfinished index."""
        self._lengths.close()
        self._documents.close()
