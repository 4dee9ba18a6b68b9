"""Removes duplicates of earlier documents from a corpus.

Inputs: sources of text. Outputs: JSON lines of the documents that stay, in order, and a report with
a line for each duplicate: its file and line, the reason, and the document that stays.

Design notes:
- Exact duplicates have the same 16 bytes of BLAKE2b of the text, after Unicode NFC and with all
  white space as single spaces. Near-duplicates are those of `minhash.py`.
- The first of several duplicates stays, and documents are compared only with documents that stay,
  so the result depends only on the input and its order.
- Workers hash the texts; one process looks them up, with all hashes in memory.
"""

from __future__ import annotations

import hashlib
import unicodedata
from array import array
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from megatron_sffn.data.corpus.minhash import MinHash, empty_index
from megatron_sffn.data.output.atomic_output import atomic_output
from megatron_sffn.data.text.chunks import TextChunk, read_chunks
from megatron_sffn.data.text.documents import Document, DocumentError, documents_of
from megatron_sffn.data.text.jsonl import as_line
from megatron_sffn.data.text.sources import Source
from megatron_sffn.data.tokenize.workers import encode_in_order
from megatron_sffn.utils.errors import ConfigError

DIGEST_BYTES = 16


@dataclass(kw_only=True, slots=True)
class Signed:
    """A document with its hashes."""

    path: str
    number: int | None
    line: bytes
    digest: bytes
    sketch: Any


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Signed documents, the bytes on disk read so far, and the error after them, if any."""

    documents: list[Signed]
    consumed: int
    failure: str | None


@dataclass(frozen=True, kw_only=True)
class Signer:
    """Hashes the documents of chunks; runs in a worker.

    Args:
        key: key of the text.
        minhash: settings for near-duplicates; None: find only exact ones.
    """

    key: str
    minhash: MinHash | None

    def __call__(self, chunks: Sequence[TextChunk]) -> Batch:
        """Hash the documents up to the first faulty one."""
        documents: list[Signed] = []
        failure = None
        try:
            for chunk in chunks:
                documents += map(self._sign, documents_of(chunk))
                if chunk.fault:
                    raise DocumentError(chunk.fault)
        except DocumentError as error:
            failure = str(error)
        return Batch(documents=documents, consumed=chunks[-1].consumed, failure=failure)

    def _sign(self, document: Document) -> Signed:
        (text,) = document.texts([self.key])
        normalized = " ".join(unicodedata.normalize("NFC", text).split())
        return Signed(
            path=document.path,
            number=document.number,
            line=as_line(document, self.key, text),
            digest=hashlib.blake2b(normalized.encode(), digest_size=DIGEST_BYTES).digest(),
            sketch=self.minhash.sketch(normalized) if self.minhash else None,
        )


class KeptDocuments:
    """The documents that stay, with their files and lines."""

    def __init__(self, minhash: MinHash | None) -> None:
        self._digests: dict[bytes, int] = {}
        self._sketches = empty_index(minhash) if minhash else None
        self._paths: list[str] = []
        # Number of the file and number in the file, packed in 8 bytes for a document.
        self._places = array("Q")

    def add(self, signed: Signed) -> dict[str, Any] | None:
        """Add a document; for a duplicate return the reason and the document that stays."""
        number = len(self._places)
        first = self._digests.setdefault(signed.digest, number)
        if first != number:
            return {"reason": "exact", "of": self._place(first)}
        if self._sketches is not None and signed.sketch is not None:
            if candidates := self._sketches.get_duplicates(signed.sketch):
                # An exact copy of this document is no exact copy of the one that stays.
                del self._digests[signed.digest]
                return {"reason": "near", "of": self._place(min(map(int, candidates)))}
            self._sketches.add(str(number), signed.sketch)
        if self._paths[-1:] != [signed.path]:
            self._paths.append(signed.path)
        self._places.append((len(self._paths) - 1) << 40 | (signed.number or 0))
        return None

    def _place(self, number: int) -> dict[str, Any]:
        file, line = self._places[number] >> 40, self._places[number] & (1 << 40) - 1
        return place(self._paths[file], line or None)


def place(path: str, number: int | None) -> dict[str, Any]:
    """File and line of a document, for the report."""
    return {"file": path, "line": number}


@dataclass(kw_only=True)
class Result:
    """Counts of the documents that stay and of the duplicates, and the bytes of their lines."""

    path: str
    report: str
    kept: int = 0
    exact_duplicates: int = 0
    near_duplicates: int = 0
    kept_bytes: int = 0
    left_out_bytes: int = 0

    def count(self, signed: Signed, duplicate: dict[str, Any] | None) -> None:
        """Count a document, with the result of `KeptDocuments.add`."""
        size = len(signed.line)
        if duplicate is None:
            self.kept += 1
            self.kept_bytes += size
        else:
            self.exact_duplicates += duplicate["reason"] == "exact"
            self.near_duplicates += duplicate["reason"] == "near"
            self.left_out_bytes += size


def dedup(
    sources: Sequence[Source],
    key: str,
    minhash: MinHash | None,
    prefix: str,
    *,
    workers: int,
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda consumed: None,
) -> Result:
    """Write the documents that stay to `PREFIX.jsonl`, and `PREFIX_duplicates.jsonl`.

    Args:
        sources: the corpus.
        key: key of the text to compare.
        minhash: settings for near-duplicates; None: find only exact ones.
        prefix: path and first part of the name of both files.
        workers: number of processes that hash.
        overwrite: replace existing files.
        progress: receives the bytes on disk read so far.

    Raises:
        ConfigError: a document is faulty, or files cannot be written.
    """
    files = [Path(f"{prefix}_duplicates.jsonl"), Path(f"{prefix}.jsonl")]
    result = Result(path=str(files[1]), report=str(files[0]))
    kept_documents = KeptDocuments(minhash)
    sign = Signer(key=key, minhash=minhash)
    with (
        atomic_output(prefix, files, overwrite=overwrite) as folder,
        (folder / files[0].name).open("wb") as report,
        (folder / files[1].name).open("wb", 1 << 20) as output,
        closing(encode_in_order(sign, read_chunks(sources), workers)) as batches,
    ):
        for batch in batches:
            for signed in batch.documents:
                duplicate = kept_documents.add(signed)
                result.count(signed, duplicate)
                if duplicate is None:
                    output.write(signed.line)
                else:
                    record = place(signed.path, signed.number) | duplicate
                    report.write(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))
            if batch.failure:
                raise ConfigError(batch.failure)
            progress(batch.consumed)
        if not result.kept:
            raise ConfigError("--input holds no documents; give files with text")
    return result
