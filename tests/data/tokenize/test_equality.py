"""Gigatoken never encodes a text for which its ids would differ from Megatron's."""

from __future__ import annotations

import random
import unicodedata
from pathlib import Path
from typing import Any

import numpy
import pytest
import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from megatron_sffn.data.tokenize.engine import UnusableError
from megatron_sffn.data.tokenize.equality import replace_texts
from megatron_sffn.data.tokenize.fast_tokenizers import choose_engine
from megatron_sffn.data.tokenize.gigatoken_engine import GigatokenEngine
from megatron_sffn.data.tokenize.tokenizer import load_tokenizer
from tests.data.tokenize.test_fast_tokenizers import ids_of
from tests.support.tokenizers import EXACT, KINDS, TEXTS, Flags, arguments, hugging_face

QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NEWER_MARKS = [chr(code) for code in (0x7FD, 0x899, 0x89A, 0x89B, 0x8CF, 0x1ACC)]
"""Combining marks that the tokenizers library sorts in another order, or does not sort."""


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")


def write_qwen_like(folder: Path, added: list[AddedToken] | None = None) -> Flags:
    """Write a byte-level BPE with the normalization and the pattern of Qwen's tokenizers."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.add_tokens(added or [])
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return hugging_face(folder)


def train_sentencepiece(folder: Path, **options: Any) -> Flags:
    """Train a SentencePiece model with symbols of every kind."""
    (folder / "text").write_text("\n".join(text.replace("\0", "") for text in TEXTS * 20))
    options = {"model_type": "bpe", "byte_fallback": True, "vocab_size": 330} | options
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "symbols"),
        control_symbols=["[INST]", "<x>"],
        user_defined_symbols=["<sep>", "@@"],
        minloglevel=2,
        **options,
    )
    model = str(folder / "symbols.model")
    return ["--tokenizer-type", "GPTSentencePieceTokenizer", "--tokenizer-model", model]


def marked_texts(tokens: list[str]) -> list[str]:
    """Texts in which tokens occur within words, next to each other and cut off."""
    texts = [f"see {token} here {token}{token}x, {token[:-1]} done" for token in tokens]
    return [*texts, "".join(tokens), " ".join(tokens)]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "null"])
def test_special_tokens_that_no_sample_showed_have_the_ids_of_megatron(
    tmp_path: Path, kind: str
) -> None:
    tokenizer = load_tokenizer(arguments(KINDS[kind](tmp_path)))
    engine = choose_engine(tokenizer, ["ordinary text"], "auto", lambda line: None)
    tokens = ["<s>", "</s>", "<unk>", "<pad>", "<|endoftext|>", "<|padding|>", "<0x0A>", "▁"]
    texts = marked_texts(tokens)
    assert ids_of(engine, texts) == [list(tokenizer.tokenize(text)) for text in texts]


def test_sentencepiece_tokens_that_are_not_text_have_the_right_ids(tmp_path: Path) -> None:
    flags = train_sentencepiece(tmp_path, **EXACT)
    tokenizer, log = load_tokenizer(arguments(flags)), []
    engine = choose_engine(tokenizer, ["ordinary text"], "auto", log.append)
    assert isinstance(engine, GigatokenEngine)
    assert "texts with '</s>', '<s>', '<sep>', '<unk>' or 3 more go to Megatron's" in log[0]
    model = sentencepiece.SentencePieceProcessor(model_file=flags[-1])
    pieces = [model.id_to_piece(number) for number in range(model.get_piece_size())]
    texts = [*marked_texts(["<s>", "</s>", "<unk>", "[INST]", "<x>", "<sep>", "@@"]), *pieces]
    encoded = [model.encode(text) for text in texts]
    assert ids_of(engine, texts) == encoded
    # No control symbols, which would end documents within the text.
    assert not {1, 2} & set(encoded[0] + encoded[1])
    # gigatoken alone gives control symbols.
    assert 1 in engine._encode(["see <s> here"])[0]


def test_special_tokens_of_legacy_flags_have_the_right_ids(tmp_path: Path) -> None:
    flags = train_sentencepiece(tmp_path, **EXACT)
    flags += ["--tokenizer-sentencepiece-legacy", "--tokenizer-special-tokens", "<s>", "<new>"]
    tokenizer = load_tokenizer(arguments(flags))
    engine = choose_engine(tokenizer, ["ordinary text"], "auto", lambda line: None)
    texts = marked_texts(["<s>", "<new>", "[INST]"])
    assert ids_of(engine, texts) == [tokenizer.tokenize(text) for text in texts]


def test_a_model_that_normalizes_is_encoded_by_sentencepiece(tmp_path: Path) -> None:
    tokenizer, log = load_tokenizer(arguments(train_sentencepiece(tmp_path))), []
    engine = choose_engine(tokenizer, ["ordinary text"], "auto", log.append)
    assert "gigatoken normalizes text in its own way (the model's rule is nmt_nfkc)" in log[0]
    assert ids_of(engine, ["see <s> here </s> done"]) == [
        tokenizer.tokenize("see <s> here </s> done")
    ]


def test_marks_and_characters_of_newer_unicode_have_the_right_ids(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(arguments(write_qwen_like(tmp_path / "qwen")))
    engine = choose_engine(tokenizer, ["ordinary text"], "auto", lambda line: None)
    assert isinstance(engine, GigatokenEngine)
    texts = [f"e{mark}\u0301 {mark}{mark}a\u0327{mark}" for mark in NEWER_MARKS]
    texts += [f"in {chr(code)}{chr(code + 1)}'s" for code in (0x323B0, 0x33000, 0x30000, 0xE000)]
    # Composed in Unicode 16, and not before.
    texts += ["\U00011382\U000113c9", "\U000113c9"]
    texts += ["plain", "é e\u0301 \u1112\u1161\u11ab 한글 日本語 が か\u3099"]
    expected = [tokenizer.tokenize(text) for text in texts]
    assert ids_of(engine, texts) == expected
    assert [ids_of(engine, [text])[0] for text in texts] == expected
    # gigatoken alone sorts the marks of the first text in another order.
    assert engine._encode(texts[:1])[0].tolist() != expected[0]


def test_random_characters_have_the_right_ids(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(arguments(write_qwen_like(tmp_path / "qwen")))
    engine = choose_engine(tokenizer, ["ordinary text"], "auto", lambda line: None)
    rng = random.Random(0)
    scripts = [range(start, start + 0x80) for start in range(0, 0x3100, 0x180)]
    scripts += [range(0xA000, 0xA880), range(0x1F300, 0x1FB00), range(0x11000, 0x12000)]
    texts = [
        "".join(map(chr, rng.choices([*script, 0x20, 0x301, 0x61], k=60))) for script in scripts
    ]
    assert ids_of(engine, texts) == [tokenizer.tokenize(text) for text in texts]
    # gigatoken encodes most of them.
    assigned = [text for text in texts if all(unicodedata.category(char) != "Cn" for char in text)]
    assert len(engine._equality.doubtful([text.encode() for text in assigned])) < len(assigned) / 2


def test_a_flagged_token_among_many_has_the_right_ids(tmp_path: Path) -> None:
    added = [AddedToken(f"<|x{number}|>") for number in range(310)]
    added += [AddedToken("late", single_word=True), AddedToken("wide", lstrip=True, rstrip=True)]
    tokenizer = load_tokenizer(arguments(write_qwen_like(tmp_path / "many", added)))
    engine = choose_engine(tokenizer, ["ordinary text"], "auto", lambda line: None)
    assert isinstance(engine, GigatokenEngine)
    texts = ["latex", "late", "too late.", "a \n wide\u3000 b", "<|x309|><|x30|>9|>"]
    assert ids_of(engine, texts) == [tokenizer.tokenize(text) for text in texts]


def refusal_of(folder: Path, tokenizer: Tokenizer) -> str:
    """The sentence with which gigatoken refuses a tokenizer."""
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    with pytest.raises(UnusableError) as error:
        GigatokenEngine(load_tokenizer(arguments(hugging_face(folder))))
    return str(error.value)


def test_tokenizers_with_settings_that_gigatoken_ignores_are_refused(tmp_path: Path) -> None:
    file = Path(write_qwen_like(tmp_path / "qwen")[-1]) / "tokenizer.json"
    uncut = Tokenizer.from_file(str(file))
    uncut.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    assert "cuts text into other words" in refusal_of(tmp_path / "uncut", uncut)
    punctuation = Tokenizer.from_file(str(file))
    punctuation.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation(), punctuation.pre_tokenizer]
    )
    assert "cuts text into other words" in refusal_of(tmp_path / "punctuation", punctuation)
    dropout = Tokenizer.from_file(str(file))
    dropout.model.dropout = 0.1
    assert "cannot follow BPE dropout (0.1)" in refusal_of(tmp_path / "dropout", dropout)


def test_ids_of_two_engines_keep_the_order_of_the_texts() -> None:
    fast_results = numpy.array([5, 5, 5, 1, 2, 3]), numpy.array([3, 2, 0, 0, 1])
    slow_results = numpy.array([7, 8, 9]), numpy.array([1, 2])
    ids, lengths = replace_texts(fast_results, slow_results, [0, 3])
    assert ids.tolist() == [7, 1, 2, 8, 9, 3]
    assert lengths.tolist() == [1, 2, 0, 2, 1]
