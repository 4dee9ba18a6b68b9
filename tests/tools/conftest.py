"""What the tests of the tools share: the scripts, a tokenizer, and files of odd text."""

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from megatron_sffn.data.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

WriteLines = Callable[[Path, Iterable[object]], Path]
StartTool = Callable[..., "subprocess.Popen[str]"]

TEXTS = [
    "plain words, and some more plain words",
    "  two  leading, double   and trailing spaces  ",
    "def f(x):\n\treturn x\n\n\n    # indented\r\n",
    "Grüße, 日本語, עברית, 🦙🦙, e\u0301, \u2028 line separator",
    "\x00\x01\x7f control and \u00a0 no-break",
    "don 't clean up , these ! spaces .",
    "1234567890 0x1F 3.14e-10",
    "\n",
]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Texts that a careless tokenizer changes."""
    return TEXTS


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
    """Starts a tool as a process group of its own."""

    def start(name: str, *arguments: object) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, str(ROOT / "tools" / name), *map(str, arguments)],
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
    import train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    trained = train_tokenizer.train(TEXTS * 3, vocab_size=400, min_frequency=2)
    train_tokenizer.save(trained, folder)
    return folder


@pytest.fixture(scope="session")
def build_tokenizer() -> Callable[[Path], object]:
    """Loads a folder the way `--tokenizer-type HuggingFaceTokenizer` does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron's, of every accelerator library it misses
        import preprocess_data

        parser = preprocess_data.build_parser()

    def build(folder: Path) -> object:
        arguments = ["--input", "-", "--output-prefix", "-", "--append-eod"]
        arguments += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(folder)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return load_tokenizer(parser.parse_args(arguments), need_eod=True)

    return build
