"""The benchmark of tokenizing makes its text and refuses contenders that disagree."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.agreement import DisagreementError
from benchmarks.preprocess import run, text
from megatron_sffn.utils.errors import ConfigError


def test_texts_are_repeated_up_to_any_size(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    texts = ["ä" * 100, "b" * 50, "c"]
    documents, distinct = text.write_text(path, iter(texts), 2000)
    lines = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    assert len(lines) == documents and lines[:4] == [*texts, texts[0]]
    assert distinct < 2000 <= path.stat().st_size < 2000 + 220
    documents, distinct = text.write_text(path, iter(texts), 10)
    assert (documents, distinct) == (1, path.stat().st_size)
    with pytest.raises(ConfigError, match="holds no text"):
        text.write_text(path, iter([]), 10)


def test_the_environment_has_enough_text() -> None:
    texts = text.texts_of(None)
    assert sum(len(next(texts)) for _ in range(100)) > 100_000


def test_contenders_that_disagree_are_refused() -> None:
    results = {
        "encode_batch": {"ids": "a", "seconds": 1.0},
        "Megatron-LM": {"ids": "a", "index": "b", "seconds": 2.0},
        "ours": {"ids": "a", "index": "b", "seconds": 3.0},
    }
    run.check(results)
    with pytest.raises(DisagreementError, match="different ids"):
        run.check({**results, "ours": {"ids": "c", "index": "b"}})
    with pytest.raises(DisagreementError, match="different index"):
        run.check({**results, "ours": {"ids": "a", "index": "c"}})
