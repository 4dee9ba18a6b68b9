"""Tokenizers of every kind load without a network, and every error is one sentence."""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, trainers

from megatron_sffn.data.tokenize.encoder_spec import EncoderSpec
from megatron_sffn.data.tokenize.tokenizer import (
    changed_text,
    difference_from_file,
    load_tokenizer,
    localize_tokenizer,
)
from megatron_sffn.utils.errors import ConfigError
from tests.support import tokenizers
from tests.support.tokenizers import KINDS, TEXTS, arguments


@pytest.fixture(autouse=True)
def no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse network connections, and use an empty cache."""

    def refuse_connection(*_: object) -> None:
        raise AssertionError("a tokenizer asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse_connection)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("RANK", "0")  # without it Megatron's logging warns


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizers_of_every_kind_load_and_decode_what_they_encode(
    tmp_path: Path, kind: str
) -> None:
    tokenizer = load_tokenizer(arguments(KINDS[kind](tmp_path)), need_eod=True)
    texts = ["1 2", "999 0 3"] if kind == "null" else TEXTS
    assert changed_text(tokenizer, texts) is None
    assert 0 <= tokenizer.eod < tokenizer.vocab_size
    ids = [id for text in texts for id in tokenizer.tokenize(text)]
    assert 0 <= min(ids) <= max(ids) < tokenizer.vocab_size


def test_the_byte_tokenizer_has_bytes_as_ids(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(arguments(tokenizers.bytes_as_ids(tmp_path)))
    text = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x11000), 0x10FFFF]))
    assert tokenizer.tokenize(text) == list(text.encode())
    assert (tokenizer.eod, tokenizer.vocab_size) == (256, 258)


def test_gpt2_loads_the_tokenizer_of_its_two_files(tmp_path: Path) -> None:
    flags = tokenizers.gpt2(tmp_path)
    expected = load_tokenizer(arguments(tokenizers.byte_level(tmp_path)))
    first, second = load_tokenizer(arguments(flags)), load_tokenizer(arguments(flags))
    for text in TEXTS:
        assert first.tokenize(text) == second.tokenize(text) == expected.tokenize(text)
    assert len(list((tmp_path / "cache" / "megatron_sffn").iterdir())) == 1
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    assert load_tokenizer(arguments(flags)).tokenize("words") != first.tokenize("words")


def test_megatron_loads_a_localized_tokenizer(tmp_path: Path) -> None:
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    for kind in ("gpt2", "json_file"):
        args = arguments(KINDS[kind](tmp_path), pad_vocab_size=False)
        args_before = vars(args).copy()
        expected = load_tokenizer(args).tokenize(TEXTS[0])
        assert vars(args) == args_before
        localize_tokenizer(args)
        assert build_tokenizer(args).tokenize(TEXTS[0]) == expected


def test_a_tokenizer_that_changes_text_is_detected(tmp_path: Path) -> None:
    lossy = load_tokenizer(arguments(tokenizers.lossy(tmp_path)))
    assert changed_text(lossy, ["fine words", "some  spaces"]) == (" spaces", "spaces")
    assert changed_text(lossy, ["words word"]) is None


def encoder_spec_of(args: argparse.Namespace) -> EncoderSpec:
    """The encoder of plain documents with this tokenizer."""
    return EncoderSpec(
        tokenizer=args,
        keys=("text",),
        language=None,
        keep_newlines=False,
        append_eod=True,
        engine="auto",
    )


@pytest.mark.parametrize("lowercase", [False, True])
def test_a_tokenizer_class_that_ignores_its_file_is_refused(
    tmp_path: Path, lowercase: bool
) -> None:
    folder = Path(tokenizers.byte_level(tmp_path, vocab_size=600)[-1])
    file = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    if lowercase:
        tokenizer.normalizer = normalizers.Lowercase()
    else:
        digits = pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    training_texts = [str(number) for number in range(2000, 2030)] + ["in 2023"] * 9
    tokenizer.train_from_iterator(
        training_texts, trainers.BpeTrainer(vocab_size=600, show_progress=False)
    )
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(file))
    config = folder / "tokenizer_config.json"

    def spec_of_class(name: str) -> EncoderSpec:
        config.write_text(json.dumps({"tokenizer_class": name, "eos_token": "<|endoftext|>"}))
        return encoder_spec_of(arguments(tokenizers.hugging_face(folder)))

    correct = spec_of_class("PreTrainedTokenizerFast").load()[0]
    assert difference_from_file(correct, str(folder)) is None
    assert correct.tokenize("In 2023") == Tokenizer.from_file(str(file)).encode("In 2023").ids
    wrong_class = spec_of_class("GPT2Tokenizer")
    with pytest.raises(ConfigError, match=r"has the class GPT2Tokenizer, .* tokenizer.json gives"):
        wrong_class.load()
    # Training only decodes with it, so it still loads there.
    assert "PreTrainedTokenizerFast" in (
        difference_from_file(load_tokenizer(wrong_class.tokenizer), str(file)) or ""
    )


def test_a_model_without_an_end_of_document_is_refused(tmp_path: Path) -> None:
    flags = tokenizers._sentence_piece(tmp_path, model_type="bpe", eos_id=-1)
    assert load_tokenizer(arguments(flags)).eod == -1
    with pytest.raises(ConfigError, match="has no end-of-document token; leave out --append-eod"):
        load_tokenizer(arguments(flags), need_eod=True)


def test_bpe_dropout_causes_a_warning(tmp_path: Path) -> None:
    flags = tokenizers.byte_level(tmp_path)
    file = Path(flags[-1]) / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["dropout"] = 0.5
    file.write_text(json.dumps(content))
    spec, log = encoder_spec_of(arguments(flags)), []
    spec.encoder(spec.load(), ["text"], log.append)
    assert log[0].startswith("warning: the tokenizer leaves out merges at random (dropout")
    assert "ids by Megatron's tokenizer; gigatoken cannot follow BPE dropout (0.5)" in log[1]


def arguments_in(tmp_path: Path, *flags: str) -> argparse.Namespace:
    return arguments([flag.replace("DIR", str(tmp_path)) for flag in flags])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], r"--tokenizer-type is not given and there is no default; .* use:"),
        (["HuggingFaceTokenizer", "--tokenizer-model", "DIR/no"], "DIR/no does not exist; give"),
        (["HuggingFaceTokenizer", "--tokenizer-model", "DIR"], "DIR cannot be loaded .*; check"),
        (
            ["HuggingFaceTokenizer", "--tokenizer-model", "some/model"],
            "some/model is no folder here, and the hub's cache .* not have it; .*HF_HUB_OFFLINE=0",
        ),
        (
            ["HuggingFaceTokenizer", "--tokenizer-model", "DIR/other.json"],
            "DIR/other.json is a file of another name than tokenizer.json, .*; give it that name",
        ),
        (["GPT2BPETokenizer"], "has --vocab-file None and --merge-file None; give both"),
        (["GPT2BPETokenizer", "--vocab-file", "DIR/other.json"], "--merge-file None; give both"),
        (["GPT2BPETokenizer", "--vocab-file", "DIR/no"], "--vocab-file DIR/no does not exist"),
        (["GPTSentencePieceTokenizer", "--tokenizer-model", "DIR/other.json"], "cannot be loaded"),
        (["GPTSentencePieceTokenizer"], "cannot be loaded .*; check the tokenizer flags"),
        (["TikTokenizer", "--tokenizer-model", "DIR/a.tiktoken"], "is not what TikTokenizer reads"),
        (["TikTokenizer", "--tokenizer-model", "DIR/bad.json"], r"bad.json is not JSON \(.*; copy"),
        (
            ["TikTokenizer", "--tokenizer-model", "DIR/other.json", "--vocab-size", "1500"],
            r"--vocab-size 1500 is more than the 3 tokens of .* 1000; give --vocab-size 1003",
        ),
        (["NullTokenizer"], "NullTokenizer .* cannot be loaded"),
    ],
)
def test_unusable_tokenizers_are_reported_in_one_sentence(
    tmp_path: Path, flags: list[str], message: str
) -> None:
    (tmp_path / "other.json").write_text("[1, 2, 3]")
    (tmp_path / "bad.json").write_text("[1, 2")
    (tmp_path / "a.tiktoken").write_text("IQ== 0\n")
    type_flags = ["--tokenizer-type", *flags] if flags else []
    with pytest.raises(ConfigError, match=message.replace("DIR", str(tmp_path))) as error:
        load_tokenizer(arguments_in(tmp_path, *type_flags))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "cache").exists()


def test_a_tokenizer_without_an_end_of_document_token_is_refused(tmp_path: Path) -> None:
    flags = tokenizers.byte_level(tmp_path)
    os.unlink(tmp_path / "tokenizer" / "tokenizer_config.json")
    assert load_tokenizer(arguments(flags)).eod is None
    with pytest.raises(ConfigError, match="no end-of-document token; leave out --append-eod, or"):
        load_tokenizer(arguments(flags), need_eod=True)


@pytest.mark.parametrize(("variable", "offline"), [(None, "True"), ("0", "False"), ("1", "True")])
def test_the_hub_is_queried_only_on_request(variable: str | None, offline: str) -> None:
    code = (
        "from argparse import Namespace\n"
        "from megatron_sffn.data.tokenize.tokenizer import localize_tokenizer\n"
        "names = ('tokenizer_model', 'vocab_file', 'merge_file')\n"
        "args = Namespace(tokenizer_type='NullTokenizer', **dict.fromkeys(names))\n"
        "localize_tokenizer(args)\n"
        "from huggingface_hub.constants import HF_HUB_OFFLINE\n"
        "print(HF_HUB_OFFLINE)\n"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": variable or ""}
    if variable is None:
        del env["HF_HUB_OFFLINE"]
    process = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    assert process.stdout.strip() == offline
