"""Removal of duplicates: which documents stay, the report, and errors."""

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

# Other tests may have left threads in this process; the workers of these use none of them.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

rensa = pytest.importorskip("rensa", reason="rensa is not installed")

RNG = random.Random(0)
WORDS = [f"word{number}" for number in range(3000)]
LONG = [" ".join(RNG.choices(WORDS, k=400)) for _ in range(60)]


def run(*arguments: object) -> int:
    return dedup_dataset.main([str(argument) for argument in arguments])


def write(path: Path, texts: Iterable[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def texts_of(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_bytes().splitlines()]


def report_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def changed(text: str, words: int) -> str:
    """The text with some of its words replaced."""
    parts = text.split()
    for at in range(0, len(parts), len(parts) // words):
        parts[at] = "other"
    return " ".join(parts)


def test_the_command_removes_duplicates(tmp_path: Path, start_tool: Any) -> None:
    first = write(tmp_path / "a.jsonl", ["one", "two words", "one"])
    second = tmp_path / "b.jsonl.gz"
    second.write_bytes(
        gzip.compress(b'{"id": 7, "text": " two \\n  words\\t"}\n\n{"id": 8, "text": "three"}\n')
    )
    process = start_tool(
        "dedup_dataset.py", "--input", first, second, "--output-prefix", tmp_path / "out"
    )
    out, err = process.communicate(timeout=HANGS)
    assert process.returncode == 0, err
    assert "out.jsonl: 3 documents of 5" in out
    assert "out_duplicates.jsonl: 2 exact and 0 near-duplicates" in out
    # Lines that stay are the same bytes.
    lines = first.read_bytes().splitlines(keepends=True)
    expected = b"".join(lines[:2]) + b'{"id": 8, "text": "three"}\n'
    assert (tmp_path / "out.jsonl").read_bytes() == expected
    assert report_of(tmp_path / "out_duplicates.jsonl") == [
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
    ("one", "other", "same"),
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
def test_exact_duplicates_are_removed(tmp_path: Path, one: str, other: str, same: bool) -> None:
    source = write(tmp_path / "a.jsonl", [one, other])
    assert run("--input", source, "--output-prefix", tmp_path / "out", "--workers", 1) == 0
    assert texts_of(tmp_path / "out.jsonl") == ([one] if same else [one, other])


def test_near_duplicates_are_removed(tmp_path: Path) -> None:
    slightly, much = changed(LONG[3], 4), changed(LONG[5], 60)
    texts = [*LONG[:10], slightly, much, slightly, LONG[3], "short", "", "Short", ""]
    source = write(tmp_path / "a.jsonl", texts)
    assert run("--input", source, "--output-prefix", tmp_path / "out", "--near") == 0
    assert texts_of(tmp_path / "out.jsonl") == [*LONG[:10], much, "short", ""]
    found = [
        (one["line"], one["reason"], one["of"]["line"])
        for one in report_of(tmp_path / "out_duplicates.jsonl")
    ]
    # A copy of one that is left out is again near to the one that stays.
    assert found == [
        (11, "near", 4),
        (13, "near", 4),
        (14, "exact", 4),
        (17, "near", 15),
        (18, "exact", 16),
    ]


def test_workers_do_not_change_the_result(tmp_path: Path) -> None:
    rng = random.Random(1)
    texts = [
        changed(text, rng.choice([2, 3, 40, 80])) if rng.random() < 0.5 else text
        for text in rng.choices(LONG, k=1500)
    ]
    for number in range(3):
        write(tmp_path / f"part{number}.jsonl", texts[number::3])
    for name, workers in (("one", 1), ("three", 3)):
        flags = ("--output-prefix", tmp_path / name, "--near", "--workers", workers)
        assert run("--input", tmp_path / "part*.jsonl", *flags) == 0
    for ending in (".jsonl", "_duplicates.jsonl"):
        one, three = ((tmp_path / f"{name}{ending}").read_bytes() for name in ("one", "three"))
        assert one == three
    kept = len(texts_of(tmp_path / "one.jsonl"))
    assert kept + len(report_of(tmp_path / "one_duplicates.jsonl")) == 1500
    assert 60 < kept < 200


def test_text_files_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, text in {"a": "one", "b": "two", "c": "one"}.items():
        (folder / f"{name}.txt").write_text(text)
    assert run("--input", folder, "--output-prefix", tmp_path / "out") == 0
    assert texts_of(tmp_path / "out.jsonl") == ["one", "two"]
    assert report_of(tmp_path / "out_duplicates.jsonl") == [
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
    write(Path("good.jsonl"), ["a", "b"])
    Path("bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    Path("empty.jsonl").touch()
    Path("cut.jsonl.gz").write_bytes(gzip.compress(Path("good.jsonl").read_bytes() * 99)[:-9])
    before = sorted(tmp_path.rglob("*"))
    base = ["--input", "good.jsonl", "--output-prefix", "out"]
    with pytest.raises(ConfigError, match=message) as error:
        run(*base, *flags.split())
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before
