"""Fixtures for the tests of tools: processes, a tokenizer, and files of unusual text."""

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from megatron_sffn.data.tokenize.tokenizer import load_tokenizer
from tests.support import tokenizers
from tests.support.paths import ROOT

WriteLines = Callable[[Path, Iterable[object]], Path]
StartTool = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Texts that a lossy tokenizer changes."""
    return tokenizers.TEXTS


@pytest.fixture(scope="session")
def write_lines() -> WriteLines:
    """Writes records, or raw bytes, as JSON lines."""

    def write(path: Path, records: Iterable[object]) -> Path:
        with path.open("wb") as file:
            for record in records:
                raw = record if isinstance(record, bytes) else json.dumps(record).encode()
                file.write(raw + b"\n")
        return path

    return write


@pytest.fixture(scope="session")
def start_tool() -> StartTool:
    """Starts a tool in a new process group."""

    def start(name: str, *flags: object) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, str(ROOT / "tools" / name), *map(str, flags)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return start


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small tokenizer, trained in this process."""
    return Path(tokenizers.byte_level(tmp_path_factory.mktemp("tokenizer"))[-1])


@pytest.fixture(scope="session")
def build_tokenizer() -> Callable[[Path], object]:
    """Loads a folder the way `--tokenizer-type HuggingFaceTokenizer` does."""

    def load(folder: Path) -> object:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Megatron warns about missing accelerator libraries
            flags = tokenizers.hugging_face(folder)
            return load_tokenizer(tokenizers.arguments(flags), need_eod=True)

    return load
