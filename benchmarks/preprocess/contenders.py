"""Contenders that turn JSON lines into tokens, each in its own process.

Inputs: a file, a tokenizer, a number of processes. Outputs: on standard output, as JSON, seconds,
tokens, and digests of the ids and of the index.

Design notes: the clock starts when everything is imported and the tokenizer is loaded, because
these seconds do not grow with the input, and stops when the files are complete.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.machine import adapt
from megatron_sffn.data.indexed.format import open_index
from megatron_sffn.utils.errors import run_command

CHUNK = 1000
"""Texts per call of `encode_batch`."""

UNIT = "Megatron-LM"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one contender."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--contender", choices=list(CONTENDERS), required=True)
    parser.add_argument("--workers", type=int, required=True)
    for name in ("text", "prefix", "tokenizer"):
        parser.add_argument(f"--{name}", required=True)
    args = parser.parse_args(argv)
    print(json.dumps(CONTENDERS[args.contender](args)))
    return 0


def encode_batch(args: Namespace) -> dict[str, Any]:
    """`encode_batch` of the library tokenizers alone, on all cores."""
    os.environ.update(TOKENIZERS_PARALLELISM="true", RAYON_NUM_THREADS=str(args.workers))
    import numpy
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(args.tokenizer) / "tokenizer.json"))
    dtype = numpy.uint16 if tokenizer.get_vocab_size() < 65500 else numpy.int32
    digest, tokens, seconds = hashlib.sha256(), 0, 0.0
    with open(args.text, "rb") as file:
        while lines := list(islice(file, CHUNK)):
            texts = [json.loads(line)["text"] for line in lines]
            start = time.perf_counter()
            ids = [encoded.ids for encoded in tokenizer.encode_batch(texts)]
            seconds += time.perf_counter() - start
            for text_ids in ids:
                digest.update(numpy.array(text_ids, dtype).tobytes())
                tokens += len(text_ids)
    return {"seconds": seconds, "tokens": tokens, "ids": digest.hexdigest()}


_tokenizer: Any = None


def _load_tokenizer(args: Namespace) -> None:
    """The start-up of a process in Megatron-LM's pool."""
    global _tokenizer
    from megatron_sffn.data.tokenize.tokenizer import load_tokenizer

    _tokenizer = load_tokenizer(tokenizer_flags(args))


def _tokenize(line: str) -> tuple[list[int], list[int]]:
    ids = _tokenizer.tokenize(json.loads(line)["text"])
    return ids, [len(ids)] if ids else []


def tokenizer_flags(args: Namespace) -> Namespace:
    """Megatron's flags for the tokenizer."""
    from megatron.training.argument_utils import ArgumentGroupFactory
    from megatron.training.config import TokenizerConfig

    parser = argparse.ArgumentParser()
    ArgumentGroupFactory(TokenizerConfig).build_group(parser, "tokenizer")
    flags = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", args.tokenizer]
    return parser.parse_args(flags)


def megatron_lm(args: Namespace) -> dict[str, Any]:
    """A pool of processes that tokenize line by line, and Megatron's builder."""
    adapt()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    _load_tokenizer(args)
    dtype = DType.optimal_dtype(_tokenizer.vocab_size)
    fork = multiprocessing.get_context("fork")
    pool = fork.Pool(args.workers, initializer=_load_tokenizer, initargs=(args,))
    pool.map(_tokenize, ['{"text": "warm up"}'] * 10 * args.workers)
    start = time.perf_counter()
    with pool, open(args.text, encoding="utf-8") as file:
        builder = IndexedDatasetBuilder(f"{args.prefix}_text_document.bin", dtype=dtype)
        for ids, lengths in pool.imap(_tokenize, file, 32):
            builder.add_document(ids, lengths)
        builder.finalize(f"{args.prefix}_text_document.idx")
    return result(args, time.perf_counter() - start)


def our_tool(engine: str) -> Callable[[Namespace], dict[str, Any]]:
    """`tools/preprocess_data.py` with an engine."""

    def run(args: Namespace) -> dict[str, Any]:
        adapt()
        from tools import preprocess_data

        flags = ["--input", args.text, "--output-prefix", args.prefix, "--engine", engine]
        flags += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", args.tokenizer]
        flags += ["--workers", str(args.workers), "--overwrite"]
        preprocess_data.build_parser()  # imports Megatron
        _load_tokenizer(args)  # imports transformers
        start = time.perf_counter()
        preprocess_data.main(flags)
        return result(args, time.perf_counter() - start)

    return run


def result(args: Namespace, seconds: float) -> dict[str, Any]:
    """The report of a contender that wrote files."""
    prefix = f"{args.prefix}_text_document"
    report: dict[str, Any] = {"seconds": seconds, "tokens": open_index(prefix).num_tokens}
    for content, ending in (("ids", ".bin"), ("index", ".idx")):
        with open(prefix + ending, "rb") as file:
            report[content] = hashlib.file_digest(file, "sha256").hexdigest()
    return report


CONTENDERS: dict[str, Callable[[Namespace], dict[str, Any]]] = {
    "encode_batch": encode_batch,
    UNIT: megatron_lm,
    "ours, tokenizers": our_tool("tokenizers"),
    "ours, gigatoken": our_tool("gigatoken"),
}


if __name__ == "__main__":
    run_command(main)
