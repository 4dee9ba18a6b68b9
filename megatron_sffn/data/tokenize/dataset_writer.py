"""Writes a data set document by document, and can resume at an earlier size.

Inputs: columns of encoded documents. Outputs: a `.bin` file as they come, and a `.idx` file at the
end, byte for byte the files of Megatron's `IndexedDatasetBuilder`.

Design notes:
- Lengths and counts are written to files at once, 8 bytes for a document, so memory does not grow
  with the number of documents; Megatron's builder keeps them in Python lists.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from megatron_sffn.data.indexed.format import PIECE, IndexWriter
from megatron_sffn.data.tokenize.encoder import Column


class DatasetWriter:
    """Writes the files of one key.

    Args:
        folder: folder of the files.
        name: name of the files, without the ending.
        dtype: numpy type of the ids.
        sizes: file name -> bytes to keep, from `sync`, to resume there; empty for a new data set.
    """

    def __init__(
        self, folder: Path, name: str, dtype: type[numpy.number[Any]], sizes: Mapping[str, int]
    ) -> None:
        self._folder, self._name, self._dtype = folder, name, dtype
        self._files = {}
        for ending in ("bin", "lengths", "counts"):
            path = folder / f"{name}.{ending}"
            path.touch()
            file = path.open("r+b", buffering=1 << 20)
            file.truncate(sizes.get(path.name, 0))
            file.seek(0, 2)
            self._files[ending] = file

    def add(self, column: Column) -> None:
        """Append documents."""
        self._files["bin"].write(column.ids.data)
        self._files["lengths"].write(column.lengths.data)
        self._files["counts"].write(column.counts.data)

    def sync(self) -> dict[str, int]:
        """Wait until everything is on the disk; returns file name -> size."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        return {f"{self._name}.{ending}": file.tell() for ending, file in self._files.items()}

    def finish(self) -> None:
        """Write the `.idx` file."""
        self.sync()
        index = IndexWriter(numpy.dtype(self._dtype), self._folder)
        for lengths in self._read("lengths"):
            index.add_sequences(lengths)
        end = 0
        for counts in self._read("counts"):
            ends = end + numpy.cumsum(counts, dtype=numpy.int64)
            index.end_documents(ends)
            end = int(ends[-1])
        index.finish(self._folder / f"{self._name}.idx")

    def close(self) -> None:
        """Close the files, also if the disk is full."""
        for file in self._files.values():
            with suppress(OSError):
                file.close()

    def _read(self, ending: str) -> Iterator[NDArray[numpy.int32]]:
        with (self._folder / f"{self._name}.{ending}").open("rb") as file:
            while (piece := numpy.fromfile(file, numpy.int32, PIECE)).size:
                yield piece
