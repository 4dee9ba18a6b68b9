"""Inspection of data sets: exact statistics, plots, and errors for damaged files."""

from __future__ import annotations

import json
import statistics
import tracemalloc
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import inspect_dataset
import numpy
import pytest

from megatron_sffn.data.indexed import format as index_format
from megatron_sffn.data.indexed import stats
from megatron_sffn.data.indexed.format import open_index
from megatron_sffn.data.indexed.stats import document_lengths, id_counts, samples
from megatron_sffn.utils.errors import ConfigError
from tests.support.dataset_pairs import random_documents, write_pair
from tests.support.processes import HANGS

DOCUMENTS = random_documents(300, vocab=90)
LENGTHS = [sum(map(len, document)) for document in DOCUMENTS]
IDS = [token for document in DOCUMENTS for sequence in document for token in sequence]


@pytest.fixture(autouse=True)
def rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set RANK: Megatron's logging warns when it is not set."""
    monkeypatch.setenv("RANK", "0")


def run(*arguments: object) -> int:
    return inspect_dataset.main([str(argument) for argument in arguments])


def test_the_command_prints_and_plots_a_data_set(
    tmp_path: Path, start_tool: Any, tokenizer_folder: Path
) -> None:
    from tokenizers import Tokenizer

    texts = ["plain words, and some more plain words", "1234567890"]
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    prefix = write_pair(tmp_path / "a", [[tokenizer.encode(text).ids] for text in texts])
    process = start_tool(
        "inspect_dataset.py", "--input", prefix, "--samples", 9,
        "--json", tmp_path / "a.json", "--plot", tmp_path / "a.png",
        "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer_folder,
    )  # fmt: skip
    stdout, stderr = process.communicate(timeout=HANGS)
    assert process.returncode == 0, stderr
    assert "Transformer Engine" not in stderr
    assert "2 documents, 2 sequences" in stdout and "tokens per document: min" in stdout
    assert all(text in stdout for text in texts)
    record = json.loads((tmp_path / "a.json").read_text())
    assert [sample["text"] for sample in record["samples"]] == texts
    assert record["ids"]["vocab_size"] == tokenizer.get_vocab_size()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a.bin", "a.idx", "a.json", "a.png",
    ]  # fmt: skip


@pytest.mark.parametrize("piece_size", [1, 64, 1 << 20])
def test_the_statistics_are_exact(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    piece_size: int,
) -> None:
    for module in (index_format, stats):
        monkeypatch.setattr(module, "PIECE", piece_size)
    prefixes = [
        write_pair(tmp_path / "a", DOCUMENTS[:123]),
        write_pair(tmp_path / "b", DOCUMENTS[123:], numpy.int32),
    ]
    assert run("--input", *prefixes, "--json", tmp_path / "out.json", "--top", 5) == 0
    record = json.loads((tmp_path / "out.json").read_text())
    assert (record["documents"], record["tokens"]) == (300, len(IDS))
    assert record["sequences"] == sum(map(len, DOCUMENTS))
    assert [entry["documents"] for entry in record["data_sets"]] == [123, 177]
    assert [entry["dtype"] for entry in record["data_sets"]] == ["uint16", "int32"]
    assert record["tokens_per_document"] == {
        "min": min(LENGTHS),
        "median": statistics.median(LENGTHS),
        "mean": pytest.approx(statistics.mean(LENGTHS)),
        "max": max(LENGTHS),
    }
    for entry in record["lengths"]:
        inside = [length for length in LENGTHS if entry["from"] <= length <= entry["to"]]
        assert (entry["documents"], entry["tokens"]) == (len(inside), sum(inside))
    assert sum(entry["documents"] for entry in record["lengths"]) == 300
    counts = Counter(IDS)
    ids = record["ids"]
    assert (ids["smallest"], ids["largest"]) == (min(IDS), max(IDS))
    assert (ids["distinct"], ids["vocab_size"]) == (len(counts), None)
    expected = sorted(counts, key=lambda token: (-counts[token], token))[:5]
    assert [entry["id"] for entry in ids["most_frequent"]] == expected
    assert [entry["count"] for entry in ids["most_frequent"]] == [
        counts[entry] for entry in expected
    ]
    stdout = capsys.readouterr().out
    assert (
        f"together: 300 documents, {record['sequences']} sequences, {len(IDS):,} tokens" in stdout
    )


@pytest.mark.parametrize("lengths", [[1], [0, 0, 5], [0, 0, 0, 2], [7, 7], [1, 2, 3, 1000], [4, 8]])
def test_the_statistics_of_few_documents_are_exact(tmp_path: Path, lengths: list[int]) -> None:
    documents = [[[1] * length] if length else [] for length in lengths]
    actual = document_lengths([open_index(write_pair(tmp_path / "a", documents))])
    assert (actual.documents, actual.tokens) == (len(lengths), sum(lengths))
    assert actual.median == statistics.median(lengths)
    bins = actual.bins()
    assert bins[0]["from"] <= min(lengths) and max(lengths) <= bins[-1]["to"]
    assert all(bin_["to"] + 1 == next_bin["from"] for bin_, next_bin in pairwise(bins))


def test_samples_are_drawn_at_random(tmp_path: Path) -> None:
    indices = [
        open_index(write_pair(tmp_path / "a", DOCUMENTS[:100])),
        open_index(write_pair(tmp_path / "b", DOCUMENTS[100:])),
    ]
    drawn = samples(indices, 40, 1, 10**9)
    assert drawn == samples(indices, 40, 1, 10**9) != samples(indices, 40, 2, 10**9)
    positions = [(sample.prefix[-1], sample.number) for sample in drawn]
    assert len(set(positions)) == 40 and positions == sorted(positions)
    assert {name for name, _ in positions} == {"a", "b"}
    for sample in drawn:
        document = DOCUMENTS[sample.number + (100 if sample.prefix.endswith("b") else 0)]
        assert sample.ids == [token for sequence in document for token in sequence]
        assert sample.length == len(sample.ids)
    assert len(samples(indices, 10**6, 1, 3)) == 300
    assert [len(sample.ids) for sample in samples(indices, 300, 1, 3)] == [
        min(length, 3) for length in LENGTHS
    ]


def test_memory_does_not_grow_with_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (index_format, stats):
        monkeypatch.setattr(module, "PIECE", 1 << 12)
    lengths = [1 + number % 5 for number in range(100_000)]
    index = open_index(write_pair(tmp_path / "a", [[[1] * length] for length in lengths]))
    tracemalloc.start()
    assert document_lengths([index]).tokens == sum(lengths)
    assert id_counts([index], lambda num_bytes: None).tolist() == [0, sum(lengths)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 400_000 < index.num_bytes


def test_the_index_alone_can_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = write_pair(tmp_path / "a", [[[5, 70000]]], numpy.int32)
    assert run("--input", prefix, "--index-only", "--json", tmp_path / "a.json") == 0
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["tokens"] == 2 and "ids" not in record and not record["samples"]
    assert "ids:" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--input nowhere", r"nowhere\.idx does not exist"),
        (
            "--input nothing",
            "nothing holds 0 documents and no tokens, which .*; make it again, of text",
        ),
        ("--input empty", "empty holds 2 documents and no tokens"),
        ("--input truncated", r"truncated\.bin has 4 bytes, but its index says 6"),
        ("--input mismatched", r"mismatched\.bin has 4 bytes, but its index says 6"),
        ("--input foreign", r"foreign\.idx is no index"),
        ("--input damaged", r"damaged\.idx is damaged, its documents"),
        ("--input large", r"large\.bin holds the id 16777216, which no vocabulary has"),
        ("--input negative", r"negative\.bin holds the id -5, which no vocabulary has"),
        ("--input good --samples -1", "--samples -1 is less than 0"),
        ("--input good --top -1", "--top -1 is less than 0"),
        ("--input good --sample-tokens 0", "--sample-tokens 0 is less than 1"),
        ("--input good --plot a.txt", r"--plot a\.txt is no picture .* end in \.png"),
        ("--input good --plot no/a.png", "--plot no/a.png lies in no folder; create no first"),
        ("--input good --json no/a.json", "--json no/a.json lies in no folder; create no"),
        (
            "--input good --tokenizer-type NullTokenizer --vocab-size 3",
            "holds the id 3, but the tokenizer has 3 ids; give the tokenizer that made",
        ),
        ("--input good --tokenizer-type HuggingFaceTokenizer --tokenizer-model ./no", "not exist"),
    ],
)
def test_bad_input_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("good", "truncated", "mismatched", "damaged"):
        write_pair(Path(name), [[[1, 2], [3]]])
    write_pair(Path("nothing"), [])
    write_pair(Path("empty"), [[], []])
    write_pair(Path("large"), [[[1, 1 << 24]]], numpy.int32)
    write_pair(Path("negative"), [[[-5, 1]]], numpy.int32)
    Path("truncated.bin").write_bytes(Path("truncated.bin").read_bytes()[:4])
    write_pair(Path("other"), [[[1, 2]]])
    Path("other.bin").replace("mismatched.bin")
    Path("foreign.bin").write_bytes(b"image")
    Path("foreign.idx").write_bytes(b"something else" * 10)
    index = Path("damaged.idx").read_bytes()
    Path("damaged.idx").write_bytes(index[:-8] + bytes(8))
    files_before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=message) as error:
        run(*flags.split())
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == files_before
