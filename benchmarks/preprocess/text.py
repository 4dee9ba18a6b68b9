"""Writes JSON lines of any size, and trains a tokenizer on them.

Inputs: text, or none to use the Python sources of this environment, more than 300 MB.

Design notes: text that is too short is repeated, which favours engines with a cache of words. So
every result has the size of the distinct text.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.machine import ROOT
from megatron_sffn.data.text.documents import read_documents
from megatron_sffn.data.text.sources import find_sources
from megatron_sffn.utils.errors import ConfigError

SOURCE_ENDINGS = (".py", ".pyi", ".h", ".hpp", ".cuh", ".md", ".rst", ".txt", ".js", ".html")
TRAINING_BYTES = 50 * 10**6


def texts_of(inputs: Sequence[str] | None) -> Iterator[str]:
    """Texts of the input, or of the sources of this Python's packages."""
    if inputs:
        for document in read_documents(find_sources(inputs, ["text"]), columns=["text"]):
            yield document.texts(["text"])[0]
        return
    for root in (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")):
        for folder, folders, names in os.walk(root):
            folders[:] = sorted(set(folders) - {"site-packages", "__pycache__"})
            for name in sorted(names):
                if name.endswith(SOURCE_ENDINGS):
                    try:
                        yield Path(folder, name).read_text(encoding="utf-8")
                    except (OSError, UnicodeDecodeError):
                        continue


def write_text(path: Path, texts: Iterator[str], size: int) -> tuple[int, int]:
    """Write JSON lines of about `size` bytes.

    Returns:
        The number of documents, and of bytes that are not repeated.
    """
    documents = written = distinct = 0
    with path.open("wb") as file:
        for text in texts:
            if written >= size:
                break
            written += file.write(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n")
            documents += 1
        distinct, distinct_documents = written, documents
        if not distinct:
            raise ConfigError("--input holds no text; give files with text")
    while written < size:
        with path.open("rb") as source, path.open("ab") as file:
            for _ in range(distinct_documents):
                if written >= size:
                    break
                written += file.write(source.readline())
                documents += 1
    return documents, distinct


def train_tokenizer(folder: Path, text: Path, vocab_size: int) -> None:
    """A byte-level BPE tokenizer trained on the first `TRAINING_BYTES`."""
    command = [sys.executable, "tools/train_tokenizer.py", "--output", str(folder), "--input", "-"]
    command += ["--vocab-size", str(vocab_size)]
    with text.open("rb") as file:
        head = file.read(TRAINING_BYTES).rpartition(b"\n")[0]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=ROOT, env=environment, input=head, stdout=sys.stderr, check=True)
