"""Tokenizer and data sets of the quick start, made by the tools of this repository.

Enters: a corpus. Leaves: `tokenizer/`, `train_text_document` and `valid_text_document` in a folder,
and `complete.json`, written last, which says of what they were made.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

from examples.quickstart.corpus import Corpus

HELD_OUT_BYTES = 400_000
"""Each evaluation reads all of the held-out text: a large corpus gives only a part of its own."""


class ToolFailedError(RuntimeError):
    """A tool ended with an error, which it has printed itself."""


def is_complete(folder: Path, corpus: Corpus, vocab_size: int) -> bool:
    """Whether the folder holds everything that would be made of this corpus."""
    try:
        found = json.loads((folder / "complete.json").read_text())
    except (OSError, ValueError):
        return False
    return bool(found == identity(corpus, vocab_size))


def identity(corpus: Corpus, vocab_size: int) -> dict[str, object]:
    """What tokenizer and data sets depend on."""
    manifest = corpus.train.with_name("corpus.json").read_bytes()
    return {"corpus": hashlib.sha256(manifest).hexdigest(), "vocab_size": vocab_size}


def train_tokenizer(folder: Path, corpus: Corpus, vocab_size: int) -> None:
    """Make `tokenizer/` of the training text."""
    (folder / "complete.json").unlink(missing_ok=True)
    run_tool(
        "train_tokenizer",
        *("--input", str(corpus.train)),
        *("--vocab-size", str(vocab_size)),
        *("--output", str(folder / "tokenizer")),
    )


def make_datasets(folder: Path, corpus: Corpus, vocab_size: int) -> None:
    """Make both data sets with the tokenizer, and declare the folder complete."""
    held_out = folder / "valid.jsonl"
    documents = corpus.valid.read_bytes().splitlines(keepends=True)
    every = -(-sum(map(len, documents)) // HELD_OUT_BYTES)
    held_out.write_bytes(b"".join(documents[::every]))
    for split, text in (("train", corpus.train), ("valid", held_out)):
        run_tool(
            "preprocess_data",
            *("--input", str(text)),
            *("--tokenizer-type", "HuggingFaceTokenizer"),
            *("--tokenizer-model", str(folder / "tokenizer")),
            *("--append-eod", "--output-prefix", str(folder / split)),
        )
    (folder / "complete.json").write_text(json.dumps(identity(corpus, vocab_size)) + "\n")


def run_tool(name: str, *arguments: str) -> None:
    """Run a tool, whose output goes to the terminal.

    Raises:
        ToolFailedError: if it failed.
    """
    root = Path(__file__).resolve().parents[2]
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-m", f"tools.{name}", *arguments]
    result = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}, check=False
    )
    if result.returncode:
        raise ToolFailedError(f"tools/{name}.py ended with exit code {result.returncode}")
