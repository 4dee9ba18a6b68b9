"""Trains a byte-level BPE tokenizer offline, or makes one whose ids are bytes.

Inputs: text, in every format that `preprocess_data.py` reads. Outputs: a folder with
`tokenizer.json` and `tokenizer_config.json` that `--tokenizer-type HuggingFaceTokenizer
--tokenizer-model DIR` loads.

Design notes:
- The tokenizer is GPT-2's byte-level BPE (Radford et al. 2019): all 256 bytes are tokens, so every
  text can be encoded and decodes to itself.
- `<|endoftext|>` (id 0) ends a document. `<|padding|>` (id 1) has its own id, because Megatron's
  data sets mask the loss of the pad token wherever it occurs.
- With `--bytes` ids 0 to 255 are bytes, the unit of results on enwik8; the two special tokens
  follow.
- The same input gives the same files.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_sffn.data.text.chunks import read_chunks
from megatron_sffn.data.text.documents import Document, DocumentError, read_documents
from megatron_sffn.data.text.sources import Source, find_sources
from megatron_sffn.utils.errors import CommandParser, ConfigError, run_command
from megatron_sffn.utils.human_size import human_size
from megatron_sffn.utils.stderr import say

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|padding|>"
SPECIAL_TOKENS = [END_OF_TEXT, PADDING]
SMALLEST_VOCAB = 256 + len(SPECIAL_TOKENS)
SAMPLE_BYTES = 4_000_000
PROGRESS_BYTES = 50_000_000
CONFIG = {
    # The class of transformers 4 and 5 that takes everything from tokenizer.json.
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": END_OF_TEXT,
    "eos_token": END_OF_TEXT,
    "pad_token": PADDING,
    # Clean-up removes spaces before punctuation: decoding would not give back the text.
    "clean_up_tokenization_spaces": False,
}


def read_texts(sources: Sequence[Source], key: str) -> Iterator[str]:
    """The texts under `key`, and the content of `.txt` files in pieces of complete lines."""
    for source in sources:
        if source.kind != "text":
            for document in read_documents([source], columns=[key]):
                yield from document.sequences([key])[0]
            continue
        for chunk in read_chunks([replace(source, kind="lines")]):
            if chunk.fault:
                raise DocumentError(chunk.fault)
            text_document = Document(path=source.name, unit="", number=None, content=chunk.content)
            yield from text_document.texts([key])


class Sample:
    """Yields texts, keeps the first ones to measure compression, and prints progress."""

    def __init__(self, texts: Iterable[str]) -> None:
        """Wrap the texts; none is read before the first iteration."""
        self._texts = texts
        self.kept: list[str] = []
        self.num_bytes = 0

    def __iter__(self) -> Iterator[str]:
        """The texts, once."""
        printed = 0
        for documents, text in enumerate(self._texts, start=1):
            if self.num_bytes < SAMPLE_BYTES:
                self.kept.append(text)
            self.num_bytes += len(text.encode())
            if self.num_bytes // PROGRESS_BYTES > printed:
                printed = self.num_bytes // PROGRESS_BYTES
                say(f"read {documents} documents, {human_size(self.num_bytes)}")
            yield text


def train(texts: Iterable[str], *, vocab_size: int, min_frequency: int) -> Tokenizer:
    """Train a tokenizer on `texts`.

    Args:
        texts: documents, read once.
        vocab_size: largest number of ids, including special tokens.
        min_frequency: a pair that occurs less often is not merged.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def bytes_as_tokens() -> Tokenizer:
    """A tokenizer whose ids are the UTF-8 bytes of a text."""
    # Byte-level tokenizers write a visible byte as its character, and others as replacements.
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    invisible = [byte for byte in range(256) if byte not in visible]
    vocab = {chr(byte): byte for byte in visible}
    vocab |= {chr(256 + number): byte for number, byte in enumerate(invisible)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the two files into `folder` atomically; other files in it stay."""
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    for stale in folder.parent.glob(f".{folder.name}.*.partial"):
        shutil.rmtree(stale)
    partial = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.partial")
    partial.mkdir()
    try:
        tokenizer.save(str(partial / "tokenizer.json"))
        config = json.dumps(CONFIG, indent=2) + "\n"
        (partial / "tokenizer_config.json").write_text(config, encoding="utf-8")
        if folder.is_dir() and any(folder.iterdir()):
            # The config first: it is the same for every tokenizer, so the two files always fit.
            for name in ("tokenizer_config.json", "tokenizer.json"):
                os.replace(partial / name, folder / name)
        else:
            os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = CommandParser(description="Train a byte-level BPE tokenizer, offline.")
    parser.add_argument(
        "--input",
        nargs="+",
        help="files, folders, globs, or - for standard input, as preprocess_data.py reads them",
    )
    parser.add_argument(
        "--bytes",
        action="store_true",
        help="make a tokenizer of bytes without training: 256 ids, and two special tokens",
    )
    parser.add_argument(
        "--json-key", default="text", help="key or column of the text (default: text)"
    )
    parser.add_argument(
        "--vocab-size",
        type=int,
        default=16384,
        help="number of ids, including special tokens (default: %(default)s)",
    )
    parser.add_argument(
        "--min-frequency", type=int, default=2, help="rarer pairs are not merged (default: 2)"
    )
    parser.add_argument("--output", required=True, help="folder to write the tokenizer to")
    args = parser.parse_args(argv)
    if args.input and args.bytes:
        raise ConfigError(
            f"--bytes trains nothing on --input {args.input[0]}; leave one of them out"
        )
    if not args.input and not args.bytes:
        raise ConfigError("--input is not given, and a tokenizer is trained on text; give files")
    if args.vocab_size < SMALLEST_VOCAB:
        raise ConfigError(
            f"--vocab-size {args.vocab_size} has no room for 256 bytes and {len(SPECIAL_TOKENS)} "
            f"special tokens; give at least {SMALLEST_VOCAB}"
        )
    if args.min_frequency < 1:
        raise ConfigError(f"--min-frequency {args.min_frequency} is less than 1; give at least 1")
    if os.path.exists(args.output) and not os.path.isdir(args.output):
        raise ConfigError(f"--output {args.output} is a file; give the path of a folder")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool with the arguments of the command line."""
    args = parse_arguments(argv)
    if args.bytes:
        tokenizer = bytes_as_tokens()
        save(tokenizer, Path(args.output))
        print(f"{args.output}: {tokenizer.get_vocab_size()} ids, one per byte and two more")
        return 0
    start = time.monotonic()
    sample = Sample(read_texts(find_sources(args.input, [args.json_key], say), args.json_key))
    say(f"reading {' '.join(args.input)}")
    tokenizer = train(sample, vocab_size=args.vocab_size, min_frequency=args.min_frequency)
    if not sample.num_bytes:
        raise ConfigError(f"--input {' '.join(args.input)} holds no text; give files with text")
    size = tokenizer.get_vocab_size()
    say(f"trained on {human_size(sample.num_bytes)} in {time.monotonic() - start:.1f} s")
    if size < args.vocab_size:
        say(f"the text has too few frequent pairs for {args.vocab_size} ids: {size} were made")
    save(tokenizer, Path(args.output))
    tokens = sum(len(item.ids) for item in tokenizer.encode_batch(sample.kept))
    size_read = sum(len(text.encode()) for text in sample.kept)
    print(
        f"{args.output}: {size} ids; {size_read / tokens:.2f} bytes per token "
        f"({tokens / size_read:.3f} tokens per byte) on {human_size(size_read)} of the input"
    )
    return 0


if __name__ == "__main__":
    run_command(main)
