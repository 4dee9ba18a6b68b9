"""Chunks of text turned into ids: what a worker does.

Enters: chunks. Leaves: for each key the ids of all documents in one array, and where they end; and
the documents that could not be used.
Choices: as in Megatron-LM, a text without ids is no sequence, and the end of a document belongs to
its last sequence. A chunk is encoded at once; only if that fails is it done by document, to find
the one that is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
from numpy.typing import NDArray

from megatron_sffn.data.text.chunks import Fault, Position, TextChunk
from megatron_sffn.data.text.documents import Document, DocumentError, documents_of
from megatron_sffn.data.text.sentences import Splitter
from megatron_sffn.data.tokenize.engine import Engine, Ids, Lengths, guarded

Texts = list[list[str]]
"""The sequences of a document, for each key."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """The documents of one key.

    Args:
        ids: `[t]`, of all documents, one after the other.
        lengths: `[s]`, ids of each sequence.
        counts: `[n]`, sequences of each document.
    """

    ids: NDArray[Any]
    lengths: NDArray[numpy.int32]
    counts: NDArray[numpy.int32]


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """What became of some chunks.

    Args:
        columns: one for each key.
        faults: documents that are left out, and why, in order.
        num_documents: in each column.
        num_bytes: size of the chunks.
        end: of the last one.
        consumed: bytes on disk that are read with it.
    """

    columns: list[Column]
    faults: list[Fault]
    num_documents: int
    num_bytes: int
    end: Position
    consumed: int


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Turns chunks into ids.

    Args:
        engine: gives the ids of texts.
        reference: the same, for a document with which the engine fails.
        keys: of the texts in a document.
        split: cuts a text into sequences; None: it is one.
        eod: id to end every document with that has any; None: none.
        vocab_size: ids are below.
        dtype: numpy type of the ids on disk.
    """

    engine: Engine
    reference: Engine
    keys: tuple[str, ...]
    split: Splitter | None
    eod: int | None
    vocab_size: int
    dtype: type[numpy.number[Any]]

    def __call__(self, chunks: Sequence[TextChunk]) -> Encoded:
        """Encode consecutive chunks."""
        found: list[tuple[Document, Texts]] = []
        faults: list[tuple[int, Fault]] = []  # with the number of documents before
        for chunk in chunks:
            for document in documents_of(chunk):
                try:
                    found.append((document, self._texts(document)))
                except DocumentError as error:
                    faults.append((len(found), error.fault))
            if chunk.fault:
                faults.append((len(found), chunk.fault))
        try:
            columns = self._columns([texts for _, texts in found], self.engine)
        except Exception:  # each tokenizer library has its own errors
            columns = self._one_by_one(found, faults)
        faults.sort(key=lambda fault: fault[0])
        return Encoded(
            columns=columns,
            faults=[fault for _, fault in faults],
            num_documents=len(columns[0].counts),
            num_bytes=sum(chunk.num_bytes for chunk in chunks),
            end=chunks[-1].end,
            consumed=chunks[-1].consumed,
        )

    def _texts(self, document: Document) -> Texts:
        sequences = document.sequences(self.keys)
        if self.split is None:
            return sequences
        return [[piece for text in texts for piece in self.split(text)] for texts in sequences]

    def _columns(self, documents: list[Texts], engine: Engine) -> list[Column]:
        return [
            self._column([texts[key] for texts in documents], engine)
            for key in range(len(self.keys))
        ]

    def _column(self, documents: list[list[str]], engine: Engine) -> Column:
        texts = [text for sequences in documents for text in sequences]
        counts = numpy.fromiter(map(len, documents), numpy.int64, len(documents))
        ids, lengths = numpy.empty(0, self.dtype), counts[:0]
        if texts:
            ids, lengths = guarded(engine, texts)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            raise ValueError(
                f"ids {ids.min()} to {ids.max()} are outside the vocabulary of {self.vocab_size}"
            )
        kept = lengths > 0
        owners = numpy.repeat(numpy.arange(len(documents)), counts)[kept]
        counts = numpy.bincount(owners, minlength=len(documents))
        lengths = lengths[kept]
        if self.eod is not None:
            ids, lengths = _append(self.eod, ids, lengths, counts)
        return Column(
            ids=ids.astype(self.dtype, copy=False),
            lengths=lengths.astype(numpy.int32, copy=False),
            counts=counts.astype(numpy.int32, copy=False),
        )

    def _one_by_one(
        self, found: list[tuple[Document, Texts]], faults: list[tuple[int, Fault]]
    ) -> list[Column]:
        """Encode each document by itself with the reference; adds those that fail to `faults`."""
        usable = []
        for place, (document, texts) in enumerate(found):
            try:
                usable.append(self._columns([texts], self.reference))
            except Exception as error:
                remedy = "remove it, or choose a tokenizer that fits the text"
                reason = f"cannot be encoded by the tokenizer ({_first_line(error)})"
                faults.append((place, document.fault(reason, remedy).fault))
        if not usable:
            return self._columns([], self.engine)
        return [_joined(columns) for columns in zip(*usable, strict=True)]


def _append(eod: int, ids: Ids, lengths: Lengths, counts: Lengths) -> tuple[Ids, Lengths]:
    """End each document that has sequences with `eod`."""
    last = (numpy.cumsum(counts) - 1)[counts > 0]
    ids = numpy.insert(ids, numpy.cumsum(lengths)[last], eod)
    lengths = lengths.copy()
    lengths[last] += 1
    return ids, lengths


def _joined(columns: Sequence[Column]) -> Column:
    return Column(
        ids=numpy.concatenate([column.ids for column in columns]),
        lengths=numpy.concatenate([column.lengths for column in columns]),
        counts=numpy.concatenate([column.counts for column in columns]),
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
