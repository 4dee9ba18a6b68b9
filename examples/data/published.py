"""WikiText-103 and enwik8, the corpora of published results, checked and in their published splits.

Inputs: the path of an archive, a folder or a file that the user has. Outputs: for WikiText-103 JSON
lines with an article each, in `train`, `valid` and `test`; for enwik8 data sets of bytes.

Design notes:
- The SHA-1 for WikiText-103 (Merity et al. 2016) are those of GluonNLP and MXNet; the SHA-1 for
  enwik8 is from the author's page, http://mattmahoney.net/dc/textdata.html.
- enwik8 is split into 90, 5 and 5 million bytes as in Mikolov et al. 2012 and in Transformer-XL.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy

from megatron_sffn.data.indexed.format import IndexWriter
from megatron_sffn.utils.errors import ConfigError

CHUNK_BYTES = 1 << 20
PARTS = ("train", "valid", "test")

WIKITEXT_103: Mapping[str, Mapping[str, str]] = {
    "tokens": {
        "wiki.train.tokens": "b7497e2dfe77e72cfef5e3dbc61b7b53712ac211",
        "wiki.valid.tokens": "c326ac59dc587676d58c422eb8a03e119582f92b",
        "wiki.test.tokens": "8a5befc548865cec54ed4273cf87dbbad60d1e47",
    },
    "raw": {
        "wiki.train.raw": "3d06627c15e834408cfee91293f862c11c1cc9ef",
        "wiki.valid.raw": "db78d4db83700cba1b1bf4a9381087043db2876d",
        "wiki.test.raw": "6f1fe2054a940eebfc76b284b09680763b37f5ea",
    },
}
"""SHA-1 of each file: `tokens` has <unk> for rare words, `raw` has the original text."""


@dataclass(frozen=True, kw_only=True)
class Enwik8:
    """The file enwik8: its SHA-1, and the bytes of train, valid and test."""

    sha1: str
    sizes: tuple[int, int, int]


ENWIK8 = Enwik8(
    sha1="57b8363b814821dc9d47aa4d41f58733519076b2", sizes=(90_000_000, 5_000_000, 5_000_000)
)

# A title is a line ` = Title = ` between blank lines; titles of sections have ` = = `.
TITLE = re.compile(rb"(?:^|(?<=\n)) \n = (?!= )[^\n]*(?<! =) = \n(?= \n)")


@contextmanager
def opened(path: Path, name: str) -> Iterator[IO[bytes]]:
    """Open a file in an archive or a folder, or the file itself.

    Raises:
        ConfigError: the archive is damaged.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            (member,) = (member for member in archive.namelist() if Path(member).name == name)
            try:
                with archive.open(member) as file:
                    yield file
            except (zipfile.BadZipFile, zlib.error, EOFError) as error:
                raise ConfigError(f"{path} is damaged ({error}); download it again") from error
    else:
        with (path / name if path.is_dir() else path).open("rb") as file:
            yield file


def names_in(path: Path) -> set[str]:
    """Names of the files in an archive or a folder, or the name of the file itself.

    Raises:
        ConfigError: the path does not exist.
    """
    if not path.exists():
        raise ConfigError(f"{path} does not exist; give the archive, or what was in it")
    if path.is_dir():
        return {file.name for file in path.iterdir()}
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return {Path(member).name for member in archive.namelist()}
    return {path.name}


def take(path: Path, name: str, sha1: str, folder: Path) -> Path:
    """Copy a file into a folder, if its SHA-1 is that of the published file.

    Raises:
        ConfigError: the SHA-1 is another.
    """
    digest = hashlib.sha1(usedforsecurity=False)
    with opened(path, name) as source, (folder / name).open("wb") as copy:
        while chunk := source.read(CHUNK_BYTES):
            digest.update(chunk)
            copy.write(chunk)
    if digest.hexdigest() != sha1:
        raise ConfigError(
            f"{name} of {path} has the SHA-1 {digest.hexdigest()}, but the published file has "
            f"{sha1}; download it again"
        )
    return folder / name


@dataclass(frozen=True, kw_only=True)
class Part:
    """Size of a part: articles, and words, where a line end counts as a word, as in papers."""

    documents: int
    words: int


def wikitext_103(path: Path, folder: Path) -> dict[str, Part]:
    """Write `train.jsonl`, `valid.jsonl` and `test.jsonl`: an article is a document.

    Args:
        path: `wikitext-103-v1.zip`, `wikitext-103-raw-v1.zip`, or a folder with their files.
        folder: folder to write to.

    Raises:
        ConfigError: files are missing, or are not the published ones.
    """
    names = names_in(path)
    kinds = [kind for kind, files in WIKITEXT_103.items() if set(files) <= names]
    if not kinds:
        first_files = [next(iter(files)) for files in WIKITEXT_103.values()]
        raise ConfigError(
            f"{path} has no {' and no '.join(first_files)}; "
            "give wikitext-103-v1.zip, wikitext-103-raw-v1.zip, or a folder with their three files"
        )
    parts = {}
    for part, (name, sha1) in zip(PARTS, WIKITEXT_103[kinds[0]].items(), strict=True):
        file = take(path, name, sha1, folder)
        parts[part] = _write_articles(file, folder / f"{part}.jsonl")
        file.unlink()
    return parts


def _write_articles(source: Path, target: Path) -> Part:
    documents = words = 0
    with target.open("w", encoding="utf-8") as lines:
        for article in articles(source):
            lines.write(json.dumps({"text": article}, ensure_ascii=False) + "\n")
            documents += 1
            words += len(article.split()) + article.count("\n")
    return Part(documents=documents, words=words)


def articles(path: Path) -> Iterator[str]:
    """The articles of a file, with their titles; concatenated they are the file."""
    with (
        path.open("rb") as file,
        closing(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)) as content,
    ):
        start = 0
        for title in TITLE.finditer(content):
            if title.start() > start:
                yield content[start : title.start()].decode("utf-8")
            start = title.start()
        yield content[start:].decode("utf-8")


def enwik8(path: Path, folder: Path) -> None:
    """Write `train_text_document`, `valid_…` and `test_…`: ids are bytes, a part is a document.

    A part may begin within a character and is then not UTF-8, so no tokenizer is used.

    Args:
        path: path of `enwik8` or of `enwik8.zip`.
        folder: folder to write to.

    Raises:
        ConfigError: the file is not the published one.
    """
    names = names_in(path)
    if "enwik8" not in names and (path.is_dir() or zipfile.is_zipfile(path)):
        raise ConfigError(f"{path} holds no file enwik8; give enwik8.zip, or the file itself")
    file = take(path, "enwik8" if "enwik8" in names else path.name, ENWIK8.sha1, folder)
    start = 0
    for part, size in zip(PARTS, ENWIK8.sizes, strict=True):
        ids = numpy.fromfile(file, numpy.uint8, size, offset=start).astype("<u2")
        ids.tofile(folder / f"{part}_text_document.bin")
        with closing(IndexWriter(ids.dtype, folder)) as writer:
            writer.add_sequences(numpy.array([size], numpy.int32))
            writer.end_documents(numpy.array([1]))
            writer.finish(folder / f"{part}_text_document.idx")
        start += size
    file.unlink()
