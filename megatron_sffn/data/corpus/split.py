"""Splits a corpus into parts, such as train, valid and test, by a hash of each document.

Inputs: text, or tokenized `.bin/.idx` pairs; names and shares of the parts.
Outputs: a file of JSON lines, or a pair, for each part, in the order of the input.

Design notes:
- The part depends only on a hash of the content. So a document is in the same part in any file,
  order and version of the corpus, on any machine, and so are its exact copies.
- Shares are relative, as in Megatron's `--split`. The size of a part with share p of N documents is
  random, with a relative standard deviation of about 1/sqrt(N p).
- Shares of bytes need a first pass, which moves the bounds between the hashes so that the bytes
  have the shares. Documents then change their part only where a bound moves.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import numpy

from megatron_sffn.data.indexed.format import Index, IndexWriter, Lengths, pieces
from megatron_sffn.data.output.atomic_output import atomic_output, bin_and_idx
from megatron_sffn.data.text.chunks import read_chunks
from megatron_sffn.data.text.documents import DocumentError, documents_of, read_documents
from megatron_sffn.data.text.jsonl import as_line
from megatron_sffn.data.text.sources import Source
from megatron_sffn.utils.errors import ConfigError

HASH_BYTES = 8
SEEDS = 1 << (8 * hashlib.blake2b.SALT_SIZE)
"""Number of seeds: as many as the salt of the hash can distinguish."""
BUFFER_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Assigns documents to parts.

    Args:
        names: names of the parts.
        bounds: the ends of their ranges of hashes, without the last.
        seed: seed of the hash.
    """

    names: tuple[str, ...]
    bounds: tuple[int, ...]
    seed: int

    def of(self, content: bytes) -> int:
        """Number of the part of a document."""
        return bisect_right(self.bounds, self.hash(content))

    def hash(self, content: bytes) -> int:
        """Hash that determines the part of a document."""
        salt = self.seed.to_bytes(hashlib.blake2b.SALT_SIZE, "little")
        digest = hashlib.blake2b(content, digest_size=HASH_BYTES, salt=salt).digest()
        return int.from_bytes(digest, "big")

    def by_bytes(self, contents: Iterable[bytes]) -> Parts:
        """The same parts with bounds so that the shares are of bytes.

        Args:
            contents: contents of all documents; 16 bytes of memory are used for each.
        """
        hashes, sizes = array("Q"), array("Q")
        for content in contents:
            hashes.append(self.hash(content))
            sizes.append(len(content))
        values = numpy.frombuffer(hashes, numpy.uint64)
        distinct, groups = numpy.unique(values, return_inverse=True)
        weights = numpy.frombuffer(sizes, numpy.uint64).astype(numpy.float64)
        bytes_before = numpy.concatenate([[0.0], numpy.bincount(groups, weights).cumsum()])
        bounds: list[int] = []
        first = 0  # first document of the part, in the order of the hashes
        for number, bound in enumerate(self.bounds):
            # Each part gets a document, if there are enough of them.
            first, last = first + 1, len(distinct) - (len(self.bounds) - number)
            bytes_at_bound = bytes_before[-1] * (bound / 2 ** (8 * HASH_BYTES))
            if first <= last:
                first += int(numpy.abs(bytes_before[first : last + 1] - bytes_at_bound).argmin())
            bounds.append(int(distinct[min(first, len(distinct) - 1)]) if len(distinct) else bound)
        return replace(self, bounds=tuple(bounds))


def parse_parts(text: str, seed: int) -> Parts:
    """Parse parts such as `train=0.98,valid=0.01,test=0.01`.

    Raises:
        ConfigError: the form is wrong, a name occurs twice, a share is not positive, or the seed is
            out of range.
    """
    if not 0 <= seed < SEEDS:
        raise ConfigError(f"--seed {seed} is not within 0 and {SEEDS - 1}; give another number")
    pairs = [item.partition("=") for item in text.split(",")]
    names = tuple(name for name, _, _ in pairs)
    if not all(re.fullmatch(r"[\w-]+", name, re.ASCII) for name in names):
        raise ConfigError(
            f"--parts {text} has a name that is not made of letters, digits, - and _; write "
            "NAME=SHARE,NAME=SHARE"
        )
    if len(set(names)) < max(len(names), 2):
        raise ConfigError(f"--parts {text} has no two different names; name each part once")
    try:
        shares = [Fraction(share) for _, _, share in pairs]
    except (ValueError, ZeroDivisionError):
        shares = [Fraction(0)]
    if min(shares) <= 0:
        raise ConfigError(
            f"--parts {text} has a share that is no positive number; write NAME=SHARE,NAME=SHARE"
        )
    ends = [sum(shares[: at + 1]) / sum(shares) for at in range(len(shares) - 1)]
    return Parts(
        names=names, bounds=tuple(int(end * 2 ** (8 * HASH_BYTES)) for end in ends), seed=seed
    )


@dataclass(kw_only=True)
class Count:
    """Size of a part: documents, bytes on disk, and tokens if it is tokenized."""

    name: str
    path: str
    documents: int = 0
    num_bytes: int = 0
    tokens: int | None = None


def split_text(
    sources: Sequence[Source],
    key: str,
    parts: Parts,
    prefix: str,
    *,
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda consumed: None,
) -> list[Count]:
    """Write `PREFIX_NAME.jsonl` for each part.

    Args:
        sources: the corpus.
        key: key of the text that determines the part.
        parts: assigns documents to parts.
        prefix: path and first part of the name of every file.
        overwrite: replace existing files.
        progress: receives the bytes on disk read so far.

    Raises:
        ConfigError: a document is faulty, a part would be empty, or files cannot be written.
    """
    files = [Path(f"{prefix}_{name}.jsonl") for name in parts.names]
    counts = [
        Count(name=name, path=str(path)) for name, path in zip(parts.names, files, strict=True)
    ]
    with atomic_output(prefix, files, overwrite=overwrite) as folder:
        with ExitStack() as stack:
            outputs = [
                stack.enter_context((folder / path.name).open("wb", BUFFER_BYTES)) for path in files
            ]
            for chunk in read_chunks(sources):
                for document in documents_of(chunk):
                    (text,) = document.texts([key])
                    part, line = parts.of(text.encode()), as_line(document, key, text)
                    outputs[part].write(line)
                    counts[part].documents += 1
                    counts[part].num_bytes += len(line)
                if chunk.fault:
                    raise DocumentError(chunk.fault)
                progress(chunk.consumed)
        _check_not_empty(counts)
    return counts


def split_datasets(
    indices: Sequence[Index],
    parts: Parts,
    prefix: str,
    *,
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda num_bytes: None,
) -> list[Count]:
    """Write `PREFIX_NAME.bin` and `.idx` for each part.

    Args:
        indices: indices of the data sets, checked and of one type.
        parts: assigns documents to parts, by the bytes of their ids.
        prefix: path and first part of the name of every file.
        overwrite: replace existing files.
        progress: receives the number of bytes of each document.

    Raises:
        ConfigError: a part would be empty, or files cannot be written.
    """
    prefixes = [f"{prefix}_{name}" for name in parts.names]
    files = [path for part_prefix in prefixes for path in bin_and_idx(part_prefix)]
    dtype = indices[0].dtype
    with atomic_output(prefix, files, overwrite=overwrite) as folder, ExitStack() as stack:
        outputs = [
            stack.enter_context(closing(_Pair(folder / Path(part_prefix).name, dtype)))
            for part_prefix in prefixes
        ]
        for index in indices:
            for content, lengths in _documents(index):
                outputs[parts.of(content)].add(content, lengths)
                progress(len(content))
        counts = [
            Count(
                name=name,
                path=part_prefix,
                documents=output.index.num_documents,
                num_bytes=output.num_bytes,
                tokens=output.num_bytes // dtype.itemsize,
            )
            for name, part_prefix, output in zip(parts.names, prefixes, outputs, strict=True)
        ]
        _check_not_empty(counts)
        for output in outputs:
            output.finish()
    return counts


def text_contents(sources: Sequence[Source], key: str) -> Iterator[bytes]:
    """The content that determines the part of each document of text.

    Raises:
        ConfigError: a document is faulty.
    """
    for document in read_documents(sources, columns=[key]):
        (text,) = document.texts([key])
        yield text.encode()


def dataset_contents(indices: Sequence[Index]) -> Iterator[bytes]:
    """The content that determines the part of each document of data sets."""
    for index in indices:
        yield from (content for content, _ in _documents(index))


class _Pair:
    """Writes a data set."""

    def __init__(self, prefix: Path, dtype: numpy.dtype[Any]) -> None:
        self._path, self._idx = (prefix.with_name(prefix.name + end) for end in (".bin", ".idx"))
        self._ids: BinaryIO = self._path.open("wb", BUFFER_BYTES)
        self.index = IndexWriter(dtype, prefix.parent)
        self.num_bytes = 0

    def add(self, content: bytes, lengths: Lengths) -> None:
        self._ids.write(content)
        self.index.add_sequences(lengths)
        self.index.end_documents(numpy.array([self.index.num_sequences]))
        self.num_bytes += len(content)

    def finish(self) -> None:
        self._ids.close()
        self.index.finish(self._idx)

    def close(self) -> None:
        self._ids.close()
        self.index.close()


def _documents(index: Index) -> Iterator[tuple[bytes, Lengths]]:
    """The ids of each document as bytes, and the lengths of its sequences."""
    lengths, bounds = index.lengths, index.documents
    with open(index.bin, "rb", BUFFER_BYTES) as ids:
        for piece in pieces(index.num_documents):
            sizes = numpy.diff(index.offsets(piece.start, piece.stop)) * index.dtype.itemsize
            ends = bounds[piece.start : piece.stop + 1].tolist()
            for size, first, last in zip(sizes.tolist(), ends[:-1], ends[1:], strict=True):
                yield ids.read(size), lengths[first:last]


def _check_not_empty(counts: Sequence[Count]) -> None:
    for count in counts:
        if not (count.documents if count.tokens is None else count.tokens):
            total = sum(part.documents for part in counts)
            raise ConfigError(
                f"the part {count.name} would be empty: of {total} documents none falls into its "
                "share; give it a larger one in --parts, or more documents"
            )
