"""The split depends only on the content of documents, loses nothing, and is atomic."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy
import pyarrow
import pyarrow.parquet
import pytest
import split_dataset
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_sffn.data.corpus.split import parse_parts
from megatron_sffn.utils.errors import ConfigError
from tests.support.dataset_pairs import content, random_documents, write_pair
from tests.support.processes import HANGS

TEXTS = [f"document {number} é 日本\n" * (1 + number % 7) for number in range(400)]


@pytest.fixture(autouse=True)
def rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set RANK: Megatron's logging warns when it is not set."""
    monkeypatch.setenv("RANK", "0")


def run(*arguments: object) -> int:
    return split_dataset.main([str(argument) for argument in arguments])


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def read_texts(folder: Path, prefix: str, names: Sequence[str]) -> dict[str, list[str]]:
    return {
        name: [record["text"] for record in read_lines(folder / f"{prefix}_{name}.jsonl")]
        for name in names
    }


PART_NAMES = ("train", "valid", "test")
PART_FLAGS = ("--parts", "train=0.8,valid=0.1,test=0.1")


@pytest.mark.parametrize("tokenized", [False, True])
def test_parts_have_the_requested_shares_of_bytes(tmp_path: Path, tokenized: bool) -> None:
    rng = random.Random(0)
    lengths = [int(10 ** rng.uniform(1, 4)) for _ in range(400)]
    if tokenized:
        documents = [[[*rng.choices(range(100), k=length)]] for length in lengths]
        source = write_pair(tmp_path / "a", documents)
        flags = ("--tokenized",)
    else:
        records = [{"text": f"{number} " + "x" * length} for number, length in enumerate(lengths)]
        source, flags = write_lines(tmp_path / "a.jsonl", [*records, *records[:50]]), ()
    command = ["--input", source, *flags, *PART_FLAGS, "--by", "bytes"]
    assert run(*command, "--output-prefix", tmp_path / "out") == 0
    ending = "bin" if tokenized else "jsonl"
    sizes = [(tmp_path / f"out_{name}.{ending}").stat().st_size for name in PART_NAMES]
    shares = [size / sum(sizes) for size in sizes]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.01)
    if not tokenized:
        # Copies are in the same part, and no document is lost.
        parts = read_texts(tmp_path, "out", PART_NAMES)
        assert sum(map(len, parts.values())) == 450
        assert len({text for texts in parts.values() for text in set(texts)}) == 400
        assert sum(len(set(texts)) for texts in parts.values()) == 400


def test_a_part_of_few_large_documents_is_not_empty(tmp_path: Path) -> None:
    records = [{"text": "x" * 10**number} for number in range(1, 6)]
    source = write_lines(tmp_path / "a.jsonl", records)
    for seed in range(5):
        flags = (
            "--by",
            "bytes",
            "--seed",
            seed,
            "--overwrite",
            "--output-prefix",
            tmp_path / "out",
        )
        assert run("--input", source, *PART_FLAGS, *flags) == 0


def test_a_closed_pipe_on_stdout_ends_the_tool(tmp_path: Path, start_tool: Any) -> None:
    source = write_lines(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    process = start_tool(
        "split_dataset.py", "--input", source, "--output-prefix", tmp_path / "out", *PART_FLAGS
    )
    process.stdout.close()
    with process.stderr as stderr:
        assert stderr.read() == ""
    assert process.wait() == 141
    assert (tmp_path / "out_test.jsonl").exists()


def test_the_command_splits_text(tmp_path: Path, start_tool: Any) -> None:
    source = write_lines(tmp_path / "a.jsonl", [{"text": text, "n": [1]} for text in TEXTS])
    process = start_tool(
        "split_dataset.py", "--input", source, "--output-prefix", tmp_path / "out", *PART_FLAGS
    )
    stdout, stderr = process.communicate(timeout=HANGS)
    assert process.returncode == 0, stderr
    parts = {name: (tmp_path / f"out_{name}.jsonl").read_bytes() for name in PART_NAMES}
    # Every line is in one part, unchanged and in the same order.
    lines = [part_lines.splitlines(keepends=True) for part_lines in parts.values()]
    order = {
        line: position
        for position, line in enumerate(source.read_bytes().splitlines(keepends=True))
    }
    positions = [[order.pop(line) for line in part_lines] for part_lines in lines]
    assert not order and all(part_lines == sorted(part_lines) for part_lines in positions)
    shares = [len(part_lines) / len(TEXTS) for part_lines in positions]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.05)
    for name, part_lines in zip(PART_NAMES, lines, strict=True):
        assert (
            f"out_{name}.jsonl: {len(part_lines)} documents ({len(part_lines) / 400:.2%})" in stdout
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a.jsonl", "out_test.jsonl", "out_train.jsonl", "out_valid.jsonl",
    ]  # fmt: skip


def test_a_document_is_always_assigned_to_the_same_part() -> None:
    # This assignment must never change, so that every machine holds out the same documents.
    parts = parse_parts("train=0.8,valid=0.1,test=0.1", 0)
    actual = [parts.of(f"document {number}".encode()) for number in range(40)]
    assert "".join(map(str, actual)) == "0000020000001200010010000000022120000002"
    other_seed = parse_parts("train=0.8,valid=0.1,test=0.1", 1)
    assert [other_seed.of(f"document {number}".encode()) for number in range(40)] != actual
    # Shares are relative and exact, in any notation.
    for spelling in ("train=8,valid=1,test=1", "train=4/5,valid=1/10,test=1/10"):
        assert parse_parts(spelling, 0) == parts


def test_the_part_of_a_document_depends_only_on_its_content(tmp_path: Path) -> None:
    """Other files, order, format, keys, compression and copies hold out the same documents."""
    shuffled = random.Random(0).sample(TEXTS, len(TEXTS))
    first = write_lines(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    assert run("--input", first, "--output-prefix", tmp_path / "a", *PART_FLAGS) == 0

    rows = pyarrow.table({"n": list(range(100)), "body": shuffled[:100]})
    pyarrow.parquet.write_table(rows, tmp_path / "b1.parquet")
    lines = "".join(json.dumps({"id": 1, "body": text}) + "\n" for text in shuffled[100:])
    (tmp_path / "b2.jsonl.gz").write_bytes(gzip.compress((lines * 2).encode()))
    flags = ("--json-key", "body", "--output-prefix", tmp_path / "b", *PART_FLAGS)
    assert run("--input", tmp_path / "b*", *flags) == 0

    for name in PART_NAMES:
        expected = {record["text"] for record in read_lines(tmp_path / f"a_{name}.jsonl")}
        records = read_lines(tmp_path / f"b_{name}.jsonl")
        assert {record["body"] for record in records} == expected
        assert len(records) == 2 * len(expected) - sum("n" in record for record in records)
        assert all(set(record) in ({"n", "body"}, {"id", "body"}) for record in records)


def test_text_files_are_split(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, text in enumerate(TEXTS[:60]):
        (folder / f"{number:02}.txt").write_text(text, newline="")
    assert run("--input", folder, "--output-prefix", tmp_path / "out", "--parts", "a=1,b=1") == 0
    texts = read_texts(tmp_path, "out", "ab")
    assert sorted(texts["a"] + texts["b"]) == sorted(TEXTS[:60])


@pytest.mark.parametrize("dtype", [numpy.uint16, numpy.int32])
def test_data_sets_are_split(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: Any
) -> None:
    documents = random_documents(300)
    prefixes = [
        write_pair(tmp_path / "a", documents[:200], dtype),
        write_pair(tmp_path / "b", documents[200:] + documents[:50], dtype),
    ]
    flags = ("--tokenized", "--output-prefix", tmp_path / "out", *PART_FLAGS)
    assert run("--input", *prefixes, *flags) == 0
    stdout = capsys.readouterr().out
    parts = parse_parts(PART_FLAGS[1], 0)
    for number, name in enumerate(PART_NAMES):
        part_documents = [
            document
            for document in documents + documents[:50]
            if parts.of(numpy.array(list(chain.from_iterable(document)), dtype).tobytes()) == number
        ]
        expected = write_pair(tmp_path / f"expected_{name}", part_documents, dtype)
        assert content(tmp_path / f"out_{name}") == content(expected)
        assert f"out_{name}: {len(part_documents)} documents" in stdout
        assert len(IndexedDataset(f"{tmp_path}/out_{name}")) == sum(map(len, part_documents))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--parts train", "--parts train has no two different names"),
        ("--parts train=1", "--parts train=1 has no two different names; name each part once"),
        ("--parts a=1,a=2", "has no two different names"),
        ("--parts a=1,b/c=2", "has a name that is not made of letters, digits, - and _; write"),
        ("--parts a=1,=2", "has a name that is not made of"),
        ("--parts a=1,b", "--parts a=1,b has a share that is no positive number; write"),
        ("--parts a=1,b=x", "has a share that is no positive number"),
        ("--parts a=1,b=0", "has a share that is no positive number"),
        ("--parts a=1,b=-1", "has a share that is no positive number"),
        ("--parts a=1,b=1/0", "has a share that is no positive number"),
        ("--parts a=1,b=inf", "has a share that is no positive number"),
        ("--parts a=1,b=1e-9", "the part b would be empty: of 4 documents none .* larger one"),
        (
            "--seed -1",
            r"--seed -1 is not within 0 and \d{39}; give another",
        ),
        (f"--seed {2**128}", "is not within 0 and"),
        ("--json-key body", r"line 1 of good\.jsonl has no key 'body' \(it has text\)"),
        ("--input bad.jsonl", r"line 2 of bad\.jsonl is not JSON"),
        ("--input cut.jsonl.gz", r"cut\.jsonl\.gz is truncated or damaged"),
        ("--input empty.jsonl", "the part train would be empty: of 0 documents none"),
        ("--input nowhere", "--input nowhere does not exist"),
        ("--output-prefix nowhere/out", "nowhere/out lies in nowhere, which is no folder"),
        ("--output-prefix good", r"good_valid\.jsonl is there already; add --overwrite"),
        ("--tokenized", r"good\.jsonl\.idx does not exist; give the path of PREFIX"),
        ("--tokenized --input ids wide", "different tokenizers made them; give sets of one"),
        ("--tokenized --input ids --parts a=1,b=1e-9", "the part b would be empty"),
        ("--input raw.parquet", r"row 1 of raw\.parquet has a value that JSON cannot hold"),
    ],
)
def test_bad_input_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in "abcd")
    Path("good.jsonl").write_text(lines)
    Path("bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    Path("cut.jsonl.gz").write_bytes(gzip.compress((lines * 99).encode())[:-9])
    Path("empty.jsonl").touch()
    Path("good_valid.jsonl").touch()
    write_pair(Path("ids"), [[[1]], [[2]]])
    write_pair(Path("wide"), [[[1]]], numpy.int32)
    rows = pyarrow.table({"text": ["a"], "raw": [b"\xff"]})
    pyarrow.parquet.write_table(rows, "raw.parquet")
    files_before = sorted(tmp_path.rglob("*"))
    valid_flags = ["--input", "good.jsonl", "--output-prefix", "out"]
    with pytest.raises(ConfigError, match=message) as error:
        run(*valid_flags, *flags.split())
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == files_before


def test_existing_files_are_replaced_on_request(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    (tmp_path / "out_train.jsonl").write_text("old")
    flags = ("--input", source, "--output-prefix", tmp_path / "out", *PART_FLAGS)
    assert run(*flags, "--overwrite") == 0
    texts = read_texts(tmp_path, "out", PART_NAMES)
    assert sorted(chain.from_iterable(texts.values())) == sorted(TEXTS)
