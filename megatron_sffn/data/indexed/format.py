"""Megatron's `.bin/.idx` pairs, of any size: looked at through the page cache, indexed in pieces.

Enters: the prefix of a pair, or the lengths of sequences as they come. Leaves: `Index`, the arrays
of a `.idx` file where they lie on disk; `IndexWriter`, another file of the kind.

Choices
- Memory holds a piece of `PIECE` entries, whatever the number of documents. Megatron's own builder
  keeps every length and document in Python lists.
- Offsets are summed in int64 from the lengths, never taken over: a set may be of any size.
- Sets with modes (multimodal) are refused: nothing here could read them.
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
"""Entries of an index that are in memory at once."""
HEAD = struct.Struct("<9sQBQQ")
"""Magic, version, code of the dtype, number of sequences, and of documents plus one."""
MAGIC, VERSION = b"MMIDIDX\0\0", 1
DTYPES = {1: "u1", 2: "i1", 3: "i2", 4: "i4", 5: "i8", 8: "u2"}
"""Megatron's codes of the types of ids; its own table, `DType`, comes with seconds of imports."""

Lengths = NDArray[numpy.int32]
Offsets = NDArray[numpy.int64]


@dataclass(frozen=True, kw_only=True)
class Index:
    """A pair, and what its `.idx` file says of the `.bin` file.

    The arrays are mapped when they are asked for and no longer than they are used: a mapped file is
    an open one, and a corpus may have more files than a process may open.

    Args:
        prefix: path of both files without the ending.
        dtype: of the ids.
        num_sequences: S.
        num_documents: N.
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
        """`[S]`, tokens of each sequence."""
        return self._map("<i4", HEAD.size, self.num_sequences)

    @property
    def pointers(self) -> Offsets:
        """`[S]`, where each begins, in bytes."""
        return self._map("<i8", HEAD.size + 4 * self.num_sequences, self.num_sequences)

    @property
    def documents(self) -> Offsets:
        """`[N + 1]`, first sequence of each document; the last is S."""
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
        """Tokens of all sequences."""
        return self.num_bytes // self.dtype.itemsize

    def offsets(self, start: int, stop: int) -> Offsets:
        """Where documents `start` to `stop` begin, in tokens; document N is the end of the file."""
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
    """Look at a pair: both files are there, whole, and made for each other.

    Args:
        prefix: path without the ending.

    Raises:
        ConfigError: a file is missing, truncated, of another format, or belongs to another one.
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
    again = "make the data set again with tools/preprocess_data.py"
    if (magic, version) != (MAGIC, VERSION) or code not in DTYPES:
        raise ConfigError(f"data set index {path} is no index; {again}")
    # A length and an offset for each sequence, and the first sequence of each document.
    size, expected = os.path.getsize(path), HEAD.size + 12 * sequences + 8 * bounds
    if size == expected + sequences > expected:
        raise ConfigError(
            f"data set index {path} has a mode for each sequence, so it is multimodal; give sets "
            "of text"
        )
    if size != expected or not bounds:
        raise ConfigError(f"data set index {path} is truncated; {again}")
    return Index(
        prefix=prefix,
        dtype=numpy.dtype(DTYPES[code]),
        num_sequences=sequences,
        num_documents=bounds - 1,
    )


def check_index(index: Index) -> None:
    """Read every entry of an index: sequences follow each other, and documents are made of them.

    Raises:
        ConfigError: an entry cannot be right.
    """
    lengths, pointers, documents = index.lengths, index.pointers, index.documents
    end = 0
    for piece in pieces(index.num_sequences):
        sizes = lengths[piece].astype(numpy.int64) * index.dtype.itemsize
        ends = end + numpy.cumsum(sizes)
        if (sizes < 0).any() or (pointers[piece] != ends - sizes).any():
            raise _damaged(index, "sequences do not follow each other")
        end = int(ends[-1])
    before = 0
    for piece in pieces(len(documents)):
        bounds = documents[piece]
        if (numpy.diff(bounds, prepend=before) < 0).any():
            raise _damaged(index, "documents are not in the order of their sequences")
        before = int(bounds[-1])
    if documents[0] != 0 or before != index.num_sequences:
        raise _damaged(index, "documents do not hold all sequences")


def _damaged(index: Index, what: str) -> ConfigError:
    return ConfigError(
        f"data set index {index.prefix}.idx is damaged, its {what}; make the data set again with "
        "tools/preprocess_data.py"
    )


class IndexWriter:
    """Writes a `.idx` file as documents come.

    Args:
        dtype: of the ids.
        folder: on the disk that has room for the index twice, until it is finished.
    """

    def __init__(self, dtype: numpy.dtype[Any], folder: Path) -> None:
        self._dtype = dtype
        # Without names: a kill leaves nothing of them.
        self._lengths = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  (until `close`)
        self._documents = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self.num_sequences = self.num_documents = 0

    def add_sequences(self, lengths: Lengths) -> None:
        """Add sequences of `[n]` tokens each."""
        self._lengths.write(lengths.astype("<i4", copy=False).tobytes())
        self.num_sequences += len(lengths)

    def end_documents(self, ends: Offsets) -> None:
        """Add documents that end before sequences `[m]`, in order."""
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
        """Give up what is not finished."""
        self._lengths.close()
        self._documents.close()
