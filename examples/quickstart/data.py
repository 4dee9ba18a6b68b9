"""Makes the tokenizer and the data sets of the quick start with the tools of this repository.

Inputs: a corpus. Outputs: `tokenizer/`, `train_text_document` and `valid_text_document` in a
folder, and `complete.json`, which is written last and identifies the corpus and the tokenizer.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from examples.quickstart.corpus import Corpus

HELD_OUT_BYTES = 400_000
"""Most bytes of held-out text, because each evaluation reads all of it."""


class ToolFailedError(RuntimeError):
    """A tool failed; it has printed its error."""


def is_complete(folder: Path, corpus: Corpus, vocab_size: int) -> bool:
    """True if the folder has the tokenizer and the data sets of this corpus."""
    try:
        saved_identity = json.loads((folder / "complete.json").read_text())
    except (OSError, ValueError):
        return False
    return bool(saved_identity == identity(corpus, vocab_size))


def identity(corpus: Corpus, vocab_size: int) -> dict[str, object]:
    """The values that determine the tokenizer and the data sets."""
    manifest = corpus.train.with_name("corpus.json").read_bytes()
    return {"corpus": hashlib.sha256(manifest).hexdigest(), "vocab_size": vocab_size}


def train_tokenizer(folder: Path, corpus: Corpus, vocab_size: int) -> None:
    """Train `tokenizer/` on the training text."""
    (folder / "complete.json").unlink(missing_ok=True)
    run_tool(
        "train_tokenizer",
        *("--input", str(corpus.train)),
        *("--vocab-size", str(vocab_size)),
        *("--output", str(folder / "tokenizer")),
    )


def make_datasets(folder: Path, corpus: Corpus, vocab_size: int) -> None:
    """Make both data sets with the tokenizer, then write `complete.json`."""
    held_out = folder / "valid.jsonl"
    documents = corpus.valid.read_bytes().splitlines(keepends=True)
    stride = -(-sum(map(len, documents)) // HELD_OUT_BYTES)
    held_out.write_bytes(b"".join(documents[::stride]))
    for split, text in (("train", corpus.train), ("valid", held_out)):
        run_tool(
            "preprocess_data",
            *("--input", str(text)),
            *("--tokenizer-type", "HuggingFaceTokenizer"),
            *("--tokenizer-model", str(folder / "tokenizer")),
            *("--append-eod", "--output-prefix", str(folder / split)),
        )
    (folder / "complete.json").write_text(json.dumps(identity(corpus, vocab_size)) + "\n")


def run_tool(name: str, *arguments: str, environment: Mapping[str, str] = os.environ) -> None:
    """Run a tool, whose output goes to the terminal.

    Args:
        name: of its file in `tools/`.
        arguments: its arguments.
        environment: its environment variables, to which the path of this repository is added.

    Raises:
        ToolFailedError: if it failed.
    """
    root = Path(__file__).resolve().parents[2]
    paths = [str(root), *filter(None, [environment.get("PYTHONPATH")])]
    command = [sys.executable, "-m", f"tools.{name}", *arguments]
    result = subprocess.run(
        command, env={**environment, "PYTHONPATH": os.pathsep.join(paths)}, check=False
    )
    if result.returncode:
        raise ToolFailedError(f"tools/{name}.py ended with exit code {result.returncode}")
