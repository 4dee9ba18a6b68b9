"""Engines are used only if they give the ids of Megatron's tokenizer."""

from __future__ import annotations

import multiprocessing
import random
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from megatron_sffn.data.tokenize import fast_tokenizers, gigatoken_engine
from megatron_sffn.data.tokenize.engine import MegatronEngine
from megatron_sffn.data.tokenize.fast_tokenizers import choose_engine
from megatron_sffn.data.tokenize.gigatoken_engine import GigatokenEngine
from megatron_sffn.data.tokenize.tokenizer import load_tokenizer
from megatron_sffn.utils.errors import ConfigError
from tests.support import tokenizers
from tests.support.tokenizers import KINDS, TEXTS, arguments

FASTEST = {
    "byte_level": "gigatoken",
    "json_file": "gigatoken",
    "surrounded": "gigatoken",
    "bytes_as_ids": "gigatoken",
    "gpt2": "gigatoken",
    "sentence_piece": "gigatoken",
    "unigram": "megatron",
    "tiktoken": "megatron",
    "null": "megatron",
}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")


def load(tmp_path: Path, kind: str) -> Any:
    return load_tokenizer(arguments(KINDS[kind](tmp_path)))


def ids_of(engine: Any, texts: list[str]) -> list[list[int]]:
    ids, lengths = engine(texts)
    ends = lengths.cumsum().tolist()
    return [ids[end - length : end].tolist() for end, length in zip(ends, lengths, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_fastest_engine_gives_the_ids_of_megatron(tmp_path: Path, kind: str) -> None:
    tokenizer, log = load(tmp_path, kind), []
    engine = choose_engine(tokenizer, [], "auto", log.append)
    assert engine.name == FASTEST[kind]
    assert len(log) == 1 and "\n" not in log[0]
    rng = random.Random(0)
    texts = ["".join(rng.choices("".join(TEXTS), k=rng.randrange(200))) for _ in range(50)]
    if kind == "null":
        texts = ["1 2 3", "4"]
    assert ids_of(engine, texts) == [list(tokenizer.tokenize(text)) for text in texts]
    assert ids_of(engine, texts[:1]) == [list(tokenizer.tokenize(texts[0]))]


@pytest.mark.parametrize("kind", ["byte_level", "surrounded", "gpt2"])
@pytest.mark.parametrize("name", ["gigatoken", "tokenizers"])
def test_special_tokens_and_empty_texts_have_the_right_ids(
    tmp_path: Path, kind: str, name: str
) -> None:
    tokenizer = load(tmp_path, kind)
    texts = ["", "a <|endoftext|>b", "<|endoftext|><|padding|>", "", "x", ""]
    engine = choose_engine(tokenizer, [], name, print)
    assert ids_of(engine, texts) == [list(tokenizer.tokenize(text)) for text in texts]


def test_special_tokens_can_be_excluded(tmp_path: Path) -> None:
    flags = [*tokenizers.surrounded(tmp_path), "--tokenizer-hf-no-include-special-tokens"]
    tokenizer = load_tokenizer(arguments(flags))
    for name in ("gigatoken", "tokenizers"):
        engine = choose_engine(tokenizer, TEXTS, name, print)
        assert ids_of(engine, TEXTS) == [tokenizer.tokenize(text) for text in TEXTS]


def choose_for(tmp_path: Path, tokenizer: Tokenizer) -> tuple[str, str]:
    """The engine that is chosen for a tokenizer, and the log line about it."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    log: list[str] = []
    loaded = load_tokenizer(arguments(tokenizers.hugging_face(folder)))
    return choose_engine(loaded, TEXTS, "auto", log.append).name, "; ".join(log)


def test_gigatoken_is_not_used_for_a_vocabulary_without_all_bytes(tmp_path: Path) -> None:
    letters = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "[U]": 2}, merges=[], unk_token="[U]"))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    name, log = choose_for(tmp_path, letters)
    assert name == "tokenizers" and "ids by tokenizers" in log


def test_the_tokenizers_library_encodes_models_that_gigatoken_cannot(tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({"plain": 0, "[U]": 1}, unk_token="[U]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.normalizer = normalizers.Lowercase()
    name, log = choose_for(tmp_path, words)
    assert name == "tokenizers" and "ids by tokenizers" in log


class WrongEngine(MegatronEngine):
    """An engine that gives wrong ids for one text of the input."""

    name = "gigatoken"

    def __call__(self, texts: Any) -> Any:
        ids, lengths = super().__call__(texts)
        if "the odd text" in texts:
            ids[-1] += 1
        return ids, lengths


def test_an_engine_that_differs_on_the_sample_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(fast_tokenizers.MAKERS, "gigatoken", WrongEngine)
    tokenizer, log = load(tmp_path, "byte_level"), []
    assert choose_engine(tokenizer, ["text"], "auto", log.append).name == "gigatoken"
    sample = ["text", "the odd text"]
    assert choose_engine(tokenizer, sample, "auto", log.append).name == "tokenizers"
    expected = tokenizer.tokenize("the odd text")
    actual = [*expected[:-1], expected[-1] + 1]
    assert log[1].endswith(f"gigatoken gives {actual[:8]} for 'the odd text', not {expected[:8]}")
    with pytest.raises(ConfigError, match=r"--engine gigatoken .* gives .* 'the odd text', not"):
        choose_engine(tokenizer, sample, "gigatoken", print)


def test_a_missing_engine_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    tokenizer, log = load(tmp_path, "byte_level"), []
    assert choose_engine(tokenizer, TEXTS, "auto", log.append).name == "tokenizers"
    assert "gigatoken is not installed (pip install gigatoken)" in log[0]
    with pytest.raises(ConfigError, match=r"--engine gigatoken cannot stand .*is not installed"):
        choose_engine(tokenizer, TEXTS, "gigatoken", print)


def test_an_unusable_engine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--engine tokenizers cannot stand .* needs a fast tok"):
        choose_engine(load(tmp_path, "unigram"), TEXTS, "tokenizers", print)


def count_loads_of_new_words(folder: Path) -> int:
    """How often gigatoken is loaded again while it encodes 200,000 new words."""
    gigatoken_engine.GROWTH_BYTES = 5 << 20
    tokenizer = load(folder, "byte_level")
    engine = GigatokenEngine(tokenizer)
    original_load, loads = engine._load, []
    engine._load = lambda: loads.append(1) or original_load()
    rng = random.Random(0)
    for _ in range(20):
        words = " ".join("".join(rng.choices("abcdefghijkl", k=10)) for _ in range(10_000))
        ids = ids_of(engine, [words])
    assert ids == [tokenizer.tokenize(words)]
    return len(loads)


def test_gigatoken_is_loaded_anew_when_it_grows(tmp_path: Path) -> None:
    # In a new process: this one would reuse memory that it has freed, and would not grow.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert 1 <= pool.submit(count_loads_of_new_words, tmp_path).result() < 20
