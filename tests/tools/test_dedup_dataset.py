"""Removal of duplicates: the remaining documents, the report, and errors."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import dedup_dataset
import pytest

from megatron_sffn.utils.errors import ConfigError
from tests.support.processes import HANGS

# Other tests may have left threads running; the workers of these tests do not use them.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

rensa = pytest.importorskip("rensa", reason="rensa is not installed")

RNG = random.Random(0)
WORDS = [f"word{number}" for number in range(3000)]
LONG = [" ".join(RNG.choices(WORDS, k=400)) for _ in range(60)]


def run(*arguments: object) -> int:
    return dedup_dataset.main([str(argument) for argument in arguments])


def write_lines(path: Path, texts: Iterable[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def read_texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_bytes().splitlines()]


def read_report(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def change_words(text: str, words: int) -> str:
    """The text with some of its words replaced."""
    text_words = text.split()
    for position in range(0, len(text_words), len(text_words) // words):
        text_words[position] = "other"
    return " ".join(text_words)


def test_the_command_removes_duplicates(tmp_path: Path, start_tool: Any) -> None:
    first = write_lines(tmp_path / "a.jsonl", ["one", "two words", "one"])
    second = tmp_path / "b.jsonl.gz"
    second.write_bytes(
        gzip.compress(b'{"id": 7, "text": " two \\n  words\\t"}\n\n{"id": 8, "text": "three"}\n')
    )
    process = start_tool(
        "dedup_dataset.py", "--input", first, second, "--output-prefix", tmp_path / "out"
    )
    stdout, stderr = process.communicate(timeout=HANGS)
    assert process.returncode == 0, stderr
    assert "out.jsonl: 3 documents of 5" in stdout
    assert "out_duplicates.jsonl: 2 exact and 0 near-duplicates" in stdout
    # The remaining lines keep their bytes.
    lines = first.read_bytes().splitlines(keepends=True)
    expected = b"".join(lines[:2]) + b'{"id": 8, "text": "three"}\n'
    assert (tmp_path / "out.jsonl").read_bytes() == expected
    assert read_report(tmp_path / "out_duplicates.jsonl") == [
        {
            "file": str(first),
            "line": 3,
            "reason": "exact",
            "of": {"file": str(first), "line": 1},
        },
        {
            "file": str(second),
            "line": 1,
            "reason": "exact",
            "of": {"file": str(first), "line": 2},
        },
    ]
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    ("first", "second", "duplicate"),
    [
        ("e\u0301", "\u00e9", True),  # composed or not
        ("a\r\nb", "a b", True),
        ("\u3000a\u00a0b ", "a b", True),
        ("", " \n", True),
        ("A", "a", False),
        ("ab", "a b", False),
        ("a.", "a", False),
    ],
)
def test_exact_duplicates_are_removed(
    tmp_path: Path, first: str, second: str, duplicate: bool
) -> None:
    source = write_lines(tmp_path / "a.jsonl", [first, second])
    assert run("--input", source, "--output-prefix", tmp_path / "out", "--workers", 1) == 0
    assert read_texts(tmp_path / "out.jsonl") == ([first] if duplicate else [first, second])


def test_near_duplicates_are_removed(tmp_path: Path) -> None:
    near, distant = change_words(LONG[3], 4), change_words(LONG[5], 60)
    texts = [*LONG[:10], near, distant, near, LONG[3], "short", "", "Short", ""]
    source = write_lines(tmp_path / "a.jsonl", texts)
    assert run("--input", source, "--output-prefix", tmp_path / "out", "--near") == 0
    assert read_texts(tmp_path / "out.jsonl") == [*LONG[:10], distant, "short", ""]
    duplicates = [
        (record["line"], record["reason"], record["of"]["line"])
        for record in read_report(tmp_path / "out_duplicates.jsonl")
    ]
    # A copy of a removed document is again a near duplicate of the first document.
    assert duplicates == [
        (11, "near", 4),
        (13, "near", 4),
        (14, "exact", 4),
        (17, "near", 15),
        (18, "exact", 16),
    ]


def test_workers_do_not_change_the_result(tmp_path: Path) -> None:
    rng = random.Random(1)
    texts = [
        change_words(text, rng.choice([2, 3, 40, 80])) if rng.random() < 0.5 else text
        for text in rng.choices(LONG, k=1500)
    ]
    for number in range(3):
        write_lines(tmp_path / f"part{number}.jsonl", texts[number::3])
    for name, workers in (("one", 1), ("three", 3)):
        flags = ("--output-prefix", tmp_path / name, "--near", "--workers", workers)
        assert run("--input", tmp_path / "part*.jsonl", *flags) == 0
    for ending in (".jsonl", "_duplicates.jsonl"):
        one_worker, three_workers = (
            (tmp_path / f"{name}{ending}").read_bytes() for name in ("one", "three")
        )
        assert one_worker == three_workers
    num_kept = len(read_texts(tmp_path / "one.jsonl"))
    assert num_kept + len(read_report(tmp_path / "one_duplicates.jsonl")) == 1500
    assert 60 < num_kept < 200


def test_text_files_are_deduplicated(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, text in {"a": "one", "b": "two", "c": "one"}.items():
        (folder / f"{name}.txt").write_text(text)
    assert run("--input", folder, "--output-prefix", tmp_path / "out") == 0
    assert read_texts(tmp_path / "out.jsonl") == ["one", "two"]
    assert read_report(tmp_path / "out_duplicates.jsonl") == [
        {
            "file": str(folder / "c.txt"),
            "line": None,
            "reason": "exact",
            "of": {"file": str(folder / "a.txt"), "line": None},
        }
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--input bad.jsonl", r"line 2 of bad\.jsonl is not JSON"),
        ("--input bad.jsonl --workers 1", r"line 2 of bad\.jsonl is not JSON"),
        ("--json-key body", r"line 1 of good\.jsonl has no key 'body'"),
        ("--input cut.jsonl.gz", r"cut\.jsonl\.gz is truncated or damaged"),
        ("--input empty.jsonl", "--input holds no documents; give files with text"),
        ("--input nowhere", "--input nowhere does not exist"),
        ("--workers 0", "--workers 0 is less than 1"),
        ("--near --threshold 2", "--threshold 2.0 is no share"),
        ("--near --ngram 0", "--ngram 0 is less than 1"),
        ("--output-prefix nowhere/out", "nowhere/out lies in nowhere, which is no folder"),
        ("--output-prefix bad", r"bad\.jsonl is there already; add --overwrite"),
    ],
)
def test_bad_input_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_lines(Path("good.jsonl"), ["a", "b"])
    Path("bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    Path("empty.jsonl").touch()
    Path("cut.jsonl.gz").write_bytes(gzip.compress(Path("good.jsonl").read_bytes() * 99)[:-9])
    files_before = sorted(tmp_path.rglob("*"))
    valid_flags = ["--input", "good.jsonl", "--output-prefix", "out"]
    with pytest.raises(ConfigError, match=message) as error:
        run(*valid_flags, *flags.split())
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == files_before
