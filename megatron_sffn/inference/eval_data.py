"""Files to evaluate as streams of tokens: texts and data sets.

Inputs: the values of `--data` of `tools/eval.py`. Outputs: ids, and the bytes of their text.

Design notes:
- A text begins with the end-of-document token, which is what precedes a document in training, so
  that its first token is scored as well; the end of the document is not scored.
- A data set is read as training reads it: one stream of documents, with the end-of-document tokens
  that it has. They are scored, as in Megatron's evaluation.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from megatron_sffn.data.indexed.format import Index, check_index, open_index
from megatron_sffn.data.text.chunks import read_chunks
from megatron_sffn.data.text.documents import documents_of
from megatron_sffn.data.text.sources import Source, find_sources, kind_of_content, kind_of_ending
from megatron_sffn.data.tokenize.tokenizer import Tokenizer, bos_of, eod_of
from megatron_sffn.inference.prompts import encode
from megatron_sffn.utils.errors import ConfigError

Ids = NDArray[Any]
"""Token ids `[n]` of any integer type."""


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Tokens that follow each other, and how much text they are.

    Args:
        ids: the first is only context.
        num_bytes: bytes of the text in UTF-8; None if the tokens have no text.
    """

    ids: numpy.ndarray[Any, Any]
    num_bytes: int | None


class Data:
    """A file to score.

    Args:
        name: as given.
        tokenizer: of the run.
    """

    def __init__(self, name: str, tokenizer: Tokenizer) -> None:
        self.name, self.tokenizer = name, tokenizer

    def streams(self) -> Iterator[Stream]:
        """The tokens of the file."""
        raise NotImplementedError


class TextData(Data):
    """Texts: every one is a stream.

    Args:
        name: as given.
        tokenizer: of the run.
        key: of the text in JSON lines and Parquet.
    """

    def __init__(self, name: str, tokenizer: Tokenizer, key: str) -> None:
        super().__init__(name, tokenizer)
        self.key = key
        try:
            self.sources = [_with_kind(source) for source in find_sources([name], [key])]
        except ConfigError as error:
            raise ConfigError(str(error).replace("--input", "--data")) from error

    def streams(self) -> Iterator[Stream]:
        """A stream for each text that has tokens."""
        for text in self._texts():
            ids = text_ids(self.tokenizer, text, f"a text of --data {self.name}")
            if len(ids) > 1:
                yield Stream(ids=numpy.array(ids), num_bytes=len(text.encode()))

    def _texts(self) -> Iterator[str]:
        for chunk in read_chunks(self.sources, columns=[self.key]):
            if chunk.fault:
                raise ConfigError(str(chunk.fault))
            for document in documents_of(chunk):
                yield from document.texts([self.key])


def _with_kind(source: Source) -> Source:
    """A source whose name does not tell its kind is JSON lines or a text by its first bytes."""
    kind = kind_of_ending(source.path) or kind_of_content(source.path) or "text"
    return dataclasses.replace(source, kind=kind)


def text_ids(tokenizer: Tokenizer, text: str, name: str) -> list[int]:
    """The ids of a document, with the token that precedes its first; `name` is for errors."""
    eod = eod_of(tokenizer)
    ids = encode(tokenizer, text, name)
    if ids and ids[-1] == eod:
        ids.pop()
    if eod is None or (ids and ids[0] in (eod, bos_of(tokenizer))):
        return ids
    return [eod, *ids]


class IndexedData(Data):
    """A `.bin/.idx` pair, which is one stream.

    Args:
        name: as given.
        tokenizer: of the run.
        prefix: path without the ending.
    """

    def __init__(self, name: str, tokenizer: Tokenizer, prefix: str) -> None:
        super().__init__(name, tokenizer)
        self.index: Index = open_index(prefix)
        check_index(self.index)
        largest = int(self._ids().max()) if self.index.num_tokens else -1
        if largest >= tokenizer.vocab_size:
            raise ConfigError(
                f"--data {name} has the id {largest}, but the ids of the run's tokenizer are 0 to "
                f"{tokenizer.vocab_size - 1}; make the data set with this tokenizer"
            )

    def streams(self) -> Iterator[Stream]:
        """One stream."""
        ids = self._ids()
        yield Stream(ids=ids, num_bytes=self._num_bytes(ids[1:]))

    def _ids(self) -> Ids:
        if not self.index.num_tokens:
            return numpy.empty(0, self.index.dtype)
        return numpy.memmap(self.index.bin, self.index.dtype, "r")

    def _num_bytes(self, ids: Ids) -> int | None:
        """Bytes of the text of ids; None for ids without text."""
        if self.tokenizer.library == "null-text":
            return None
        eod = eod_of(self.tokenizer)
        bounds = [0, *(numpy.flatnonzero(ids == eod) + 1).tolist(), len(ids)]
        return sum(
            len(self.tokenizer.detokenize([int(i) for i in ids[first:last] if i != eod]).encode())
            for first, last in itertools.pairwise(bounds)
        )


def open_data(name: str, tokenizer: Tokenizer, key: str) -> Data:
    """A file of `--data`.

    Args:
        name: of a text file, a folder of them, or a data set with or without an ending.
        tokenizer: of the run.
        key: of the text in JSON lines and Parquet.

    Raises:
        ConfigError: it does not exist, or is damaged.
    """
    prefix = name.removesuffix(".bin").removesuffix(".idx")
    # A folder of the same name is where preprocessing or training kept its caches.
    is_index = Path(f"{name}.idx").is_file() and not Path(name).is_file()
    if prefix != name or is_index:
        return IndexedData(name, tokenizer, prefix)
    return TextData(name, tokenizer, key)
