"""Documents that say what an earlier one says: found, reported, left out.

Enters: sources of text. Leaves: JSON lines of the others, in their order, and a line for each that
is left out: where it is, why, and where the one is that stays.

Choices
- Exact: 16 bytes of BLAKE2b of the text, composed (Unicode NFC), every white space as one space.
- Near: as `minhash.py` says.
- The first of several stays, and documents are compared with those that stay, so the result depends
  on nothing but the input and its order.
- Texts are hashed by workers; the look-up is one process, with all hashes in memory.
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
    """A document, and what is compared of it."""

    path: str
    number: int | None
    line: bytes
    digest: bytes
    sketch: Any


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Signed documents, bytes on disk that are read, and what is wrong after them."""

    documents: list[Signed]
    consumed: int
    failure: str | None


@dataclass(frozen=True, kw_only=True)
class Signer:
    """Signs the documents of chunks; runs in a worker.

    Args:
        key: of the text.
        minhash: how near-duplicates are found, if they are.
    """

    key: str
    minhash: MinHash | None

    def __call__(self, chunks: Sequence[TextChunk]) -> Batch:
        """Up to the first document that is wrong."""
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
        normal = " ".join(unicodedata.normalize("NFC", text).split())
        return Signed(
            path=document.path,
            number=document.number,
            line=as_line(document, self.key, text),
            digest=hashlib.blake2b(normal.encode(), digest_size=DIGEST_BYTES).digest(),
            sketch=self.minhash.sketch(normal) if self.minhash else None,
        )


class Seen:
    """The documents that stay, and where each of them is."""

    def __init__(self, minhash: MinHash | None) -> None:
        self._digests: dict[bytes, int] = {}
        self._sketches = empty_index(minhash) if minhash else None
        self._paths: list[str] = []
        # A number of the file, and one in the file: 8 bytes for a document.
        self._places = array("Q")

    def add(self, signed: Signed) -> dict[str, Any] | None:
        """Take note of a document, unless one like it is there: then say why, and which."""
        number = len(self._places)
        first = self._digests.setdefault(signed.digest, number)
        if first != number:
            return {"reason": "exact", "of": self._place(first)}
        if self._sketches is not None and signed.sketch is not None:
            if alike := self._sketches.get_duplicates(signed.sketch):
                # Its copies are not exact ones of what stays.
                del self._digests[signed.digest]
                return {"reason": "near", "of": self._place(min(map(int, alike)))}
            self._sketches.add(str(number), signed.sketch)
        if self._paths[-1:] != [signed.path]:
            self._paths.append(signed.path)
        self._places.append((len(self._paths) - 1) << 40 | (signed.number or 0))
        return None

    def _place(self, number: int) -> dict[str, Any]:
        file, line = self._places[number] >> 40, self._places[number] & (1 << 40) - 1
        return place(self._paths[file], line or None)


def place(path: str, number: int | None) -> dict[str, Any]:
    """Where a document is, as reports have it."""
    return {"file": path, "line": number}


@dataclass(kw_only=True)
class Result:
    """What was done: documents that stay and that do not, and bytes of their lines."""

    path: str
    report: str
    kept: int = 0
    exact_duplicates: int = 0
    near_duplicates: int = 0
    kept_bytes: int = 0
    left_out_bytes: int = 0

    def count(self, signed: Signed, found: dict[str, Any] | None) -> None:
        """Count a document, and what was found."""
        size = len(signed.line)
        if found is None:
            self.kept += 1
            self.kept_bytes += size
        else:
            self.exact_duplicates += found["reason"] == "exact"
            self.near_duplicates += found["reason"] == "near"
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
    """Write `PREFIX.jsonl`, and `PREFIX_duplicates.jsonl` with what is not in it.

    Args:
        sources: of the documents.
        key: of the text that is compared.
        minhash: how near-duplicates are found; None: only exact ones are.
        prefix: path and first part of the name of both files.
        workers: processes that hash.
        overwrite: replace files that are there.
        progress: told the bytes on disk that are read.

    Raises:
        ConfigError: a document is wrong, or files cannot be written.
    """
    files = [Path(f"{prefix}_duplicates.jsonl"), Path(f"{prefix}.jsonl")]
    result = Result(path=str(files[1]), report=str(files[0]))
    seen = Seen(minhash)
    sign = Signer(key=key, minhash=minhash)
    with (
        atomic_output(prefix, files, overwrite=overwrite) as folder,
        (folder / files[0].name).open("wb") as report,
        (folder / files[1].name).open("wb", 1 << 20) as kept,
        closing(encode_in_order(sign, read_chunks(sources), workers)) as batches,
    ):
        for batch in batches:
            for signed in batch.documents:
                found = seen.add(signed)
                result.count(signed, found)
                if found is None:
                    kept.write(signed.line)
                else:
                    record = place(signed.path, signed.number) | found
                    report.write(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))
            if batch.failure:
                raise ConfigError(batch.failure)
            progress(batch.consumed)
        if not result.kept:
            raise ConfigError("--input holds no documents; give files with text")
    return result
