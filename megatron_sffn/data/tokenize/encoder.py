"""Encodes chunks of text to ids: the work of a worker.

Inputs: chunks. Outputs: for each key, the ids of all documents in one array, with their lengths;
and the faults of the documents that are left out.

Design notes:
- As in Megatron-LM, a text without ids is not a sequence, and the end-of-document id belongs to the
  last sequence.
- All documents of a chunk are encoded in one call. If the call fails, each is encoded by itself, to
  find the faulty one.
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
        ids: `[tokens]`, the ids of all documents.
        lengths: `[sequences]`, number of ids of each sequence.
        counts: `[documents]`, number of sequences of each document.
    """

    ids: NDArray[Any]
    lengths: NDArray[numpy.int32]
    counts: NDArray[numpy.int32]


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """The result of encoding consecutive chunks.

    Args:
        columns: one for each key.
        faults: why documents are left out, in order.
        num_documents: number of documents in each column.
        num_bytes: size of the chunks.
        end: end of the last chunk.
        consumed: bytes on disk that have been read after the last chunk.
    """

    columns: list[Column]
    faults: list[Fault]
    num_documents: int
    num_bytes: int
    end: Position
    consumed: int


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Encodes chunks.

    Args:
        engine: encodes texts.
        reference: encodes a document where the engine fails.
        keys: keys of the texts in a document.
        split: splits a text into sequences; None: a text is one sequence.
        eod: id that ends every document that has ids; None: documents are not ended.
        vocab_size: size of the vocabulary, above every id.
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
        documents: list[tuple[Document, Texts]] = []
        faults: list[tuple[int, Fault]] = []  # with the number of documents before the fault
        for chunk in chunks:
            for document in documents_of(chunk):
                try:
                    documents.append((document, self._texts(document)))
                except DocumentError as error:
                    faults.append((len(documents), error.fault))
            if chunk.fault:
                faults.append((len(documents), chunk.fault))
        try:
            columns = self._columns([texts for _, texts in documents], self.engine)
        except Exception:  # each tokenizer library raises its own errors
            columns = self._one_by_one(documents, faults)
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
        return [
            [sequence for text in texts for sequence in self.split(text)] for texts in sequences
        ]

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
        is_sequence = lengths > 0
        document_of_sequence = numpy.repeat(numpy.arange(len(documents)), counts)[is_sequence]
        counts = numpy.bincount(document_of_sequence, minlength=len(documents))
        lengths = lengths[is_sequence]
        if self.eod is not None:
            ids, lengths = _append(self.eod, ids, lengths, counts)
        return Column(
            ids=ids.astype(self.dtype, copy=False),
            lengths=lengths.astype(numpy.int32, copy=False),
            counts=counts.astype(numpy.int32, copy=False),
        )

    def _one_by_one(
        self, documents: list[tuple[Document, Texts]], faults: list[tuple[int, Fault]]
    ) -> list[Column]:
        """Encode each document by itself with the reference, and append failures to `faults`."""
        encoded = []
        for number, (document, texts) in enumerate(documents):
            try:
                encoded.append(self._columns([texts], self.reference))
            except Exception as error:
                remedy = "remove it, or choose a tokenizer that fits the text"
                reason = f"cannot be encoded by the tokenizer ({_first_line(error)})"
                faults.append((number, document.fault(reason, remedy).fault))
        if not encoded:
            return self._columns([], self.engine)
        return [_joined(columns) for columns in zip(*encoded, strict=True)]


def _append(eod: int, ids: Ids, lengths: Lengths, counts: Lengths) -> tuple[Ids, Lengths]:
    """Append `eod` to each document that has sequences."""
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
