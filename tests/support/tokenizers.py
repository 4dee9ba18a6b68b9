"""Small tokenizers of every kind, made from scratch, and their flags."""

from __future__ import annotations

import argparse
import base64
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy
import sentencepiece
import train_tokenizer
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from megatron.training.argument_utils import ArgumentGroupFactory
from megatron.training.config import TokenizerConfig
from tokenizers import Tokenizer, processors

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
"""Texts that a careless tokenizer changes."""

Flags = list[str]


def byte_level(folder: Path, vocab_size: int = 400) -> Flags:
    """A tokenizer of `tools/train_tokenizer.py`."""
    trained = train_tokenizer.train(TEXTS * 3, vocab_size=vocab_size, min_frequency=2)
    train_tokenizer.save(trained, folder / "tokenizer")
    return hugging_face(folder / "tokenizer")


def json_file(folder: Path) -> Flags:
    """The same tokenizer, named by its file instead of its folder."""
    return hugging_face(Path(byte_level(folder)[-1]) / "tokenizer.json")


def surrounded(folder: Path) -> Flags:
    """A tokenizer that adds an id before and after every text; Llama's adds one before."""
    flags = byte_level(folder)
    path = Path(flags[-1]) / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|padding|> $A <|endoftext|>",
        special_tokens=[("<|endoftext|>", 0), ("<|padding|>", 1)],
    )
    tokenizer.save(str(path))
    return flags


def large(folder: Path) -> Flags:
    """A tokenizer with more ids than fit in 16 bits."""
    flags = byte_level(folder)
    path = Path(flags[-1]) / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"] |= {f"unused {number}": number for number in range(400, 70_000)}
    path.write_text(json.dumps(content))
    return flags


def bytes_as_ids(folder: Path) -> Flags:
    """A tokenizer of `tools/train_tokenizer.py --bytes`."""
    train_tokenizer.save(train_tokenizer.bytes_as_tokens(), folder / "bytes")
    return hugging_face(folder / "bytes")


def hugging_face(path: Path) -> Flags:
    return ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(path)]


def gpt2(folder: Path) -> Flags:
    """The vocabulary and the merges in the files of GPT-2's format."""
    content = json.loads((Path(byte_level(folder)[-1]) / "tokenizer.json").read_text())
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    vocab.write_text(json.dumps(content["model"]["vocab"]))
    pairs = [" ".join(pair) for pair in content["model"]["merges"]]
    merges.write_text("\n".join(["#version: 0.2", *pairs]) + "\n")
    return [
        *("--tokenizer-type", "GPT2BPETokenizer"),
        *("--vocab-file", str(vocab), "--merge-file", str(merges)),
    ]


def sentence_piece(folder: Path) -> Flags:
    return _sentence_piece(folder, model_type="bpe", **EXACT)


def unigram(folder: Path) -> Flags:
    return _sentence_piece(folder, model_type="unigram", **EXACT)


def lossy(folder: Path) -> Flags:
    """A tokenizer that reads several spaces as one."""
    return _sentence_piece(folder, model_type="bpe")


EXACT = {"remove_extra_whitespaces": False, "normalization_rule_name": "identity"}


def _sentence_piece(folder: Path, **options: Any) -> Flags:
    text = "\n".join(text.replace("\0", "") for text in TEXTS * 20)
    (folder / "text").write_text(text)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "spiece"),
        vocab_size=320,
        byte_fallback=True,
        minloglevel=2,
        **options,
    )
    model = str(folder / "spiece.model")
    return ["--tokenizer-type", "GPTSentencePieceTokenizer", "--tokenizer-model", model]


def tiktoken(folder: Path) -> Flags:
    """TikToken in Megatron's format: a JSON list of tokens with their bytes."""
    tokens = [bytes([byte]) for byte in range(256)] + [b"wo", b"rd", b"word", b" word", b"  "]
    entries = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": ""}
        for rank, token in enumerate(tokens)
    ]
    path = folder / "tiktoken.json"
    path.write_text(json.dumps(entries))
    return [
        *("--tokenizer-type", "TikTokenizer", "--tokenizer-model", str(path)),
        *("--tiktoken-num-special-tokens", "10", "--vocab-size", str(len(tokens) + 10)),
    ]


def null(folder: Path) -> Flags:
    """A tokenizer whose texts are the ids, in digits."""
    return ["--tokenizer-type", "NullTokenizer", "--vocab-size", "1000"]


KINDS: dict[str, Callable[[Path], Flags]] = {
    make.__name__: make
    for make in (byte_level, json_file, surrounded, bytes_as_ids, gpt2, sentence_piece, unigram)
}
KINDS |= {"tiktoken": tiktoken, "null": null}


def arguments(flags: Flags, **changes: Any) -> argparse.Namespace:
    """Megatron's namespace with the tokenizer's flags."""
    parser = argparse.ArgumentParser()
    ArgumentGroupFactory(TokenizerConfig).build_group(parser, "tokenizer")
    return argparse.Namespace(**{**vars(parser.parse_args(flags)), **changes})


def write_as_megatron(
    prefix: Path, documents: Iterable[list[str]], tokenizer: Any, *, append_eod: bool
) -> None:
    """Write a data set with Megatron's builder, as Megatron-LM's tool does.

    Args:
        prefix: of the files.
        documents: the sequences of each document.
        tokenizer: built by Megatron.
        append_eod: end each document with the end-of-document id.
    """
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for sequences in documents:
        tokens = [ids for ids in map(tokenizer.tokenize, sequences) if ids]
        if tokens and append_eod:
            tokens[-1] = [*tokens[-1], tokenizer.eod]
        flat = numpy.array([id for ids in tokens for id in ids])
        builder.add_document(flat, [len(ids) for ids in tokens])
    builder.finalize(f"{prefix}.idx")
