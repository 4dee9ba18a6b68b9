"""Train a byte-level BPE tokenizer, offline.

Enters: text, as JSON lines or plain files. Leaves: a folder with `tokenizer.json` and
`tokenizer_config.json` that `--tokenizer-type HuggingFaceTokenizer --tokenizer-model DIR` loads.
Choices: GPT-2's byte-level BPE (Radford et al. 2019): all 256 bytes are tokens, so every text can
be encoded and decodes to itself. `<|endoftext|>` (id 0) ends a document. `<|padding|>` (id 1) has
an id of its own, because Megatron's datasets mask the loss of the pad token wherever it occurs.
The same input gives the same files.
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
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_sffn.data.jsonl import check_inputs, read_lines, texts_of
from megatron_sffn.errors import ConfigError, run_command

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|padding|>"
SPECIAL_TOKENS = [END_OF_TEXT, PADDING]
SMALLEST_VOCAB = 256 + len(SPECIAL_TOKENS)
SAMPLE_BYTES = 4_000_000
PROGRESS_BYTES = 50_000_000
CONFIG = {
    # The name that both transformers 4 and 5 know for "all of it is in tokenizer.json".
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": END_OF_TEXT,
    "eos_token": END_OF_TEXT,
    "pad_token": PADDING,
    # Clean-up removes spaces before punctuation: decoding would not give back the text.
    "clean_up_tokenization_spaces": False,
}


def read_texts(paths: Sequence[str], key: str) -> Iterator[str]:
    """The texts of JSON-lines files under `key`, and of `.txt` files in pieces of whole lines."""
    for path in paths:
        if not path.endswith(".txt"):
            for line in read_lines([path]):
                yield from texts_of(line, [key])
            continue
        # newline="": line ends are text too.
        with open(path, encoding="utf-8", newline="") as file:
            try:
                while lines := file.readlines(1 << 20):
                    yield "".join(lines)
            except UnicodeDecodeError as error:
                raise ConfigError(
                    f"--input {path} is not UTF-8 ({error.reason}); convert it first"
                ) from error


class Sample:
    """Passes texts on, keeps the first ones to measure compression, and prints progress."""

    def __init__(self, texts: Iterable[str]) -> None:
        """Nothing is read before the first iteration."""
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
                log(f"read {documents} documents, {self.num_bytes / 1e6:.0f} MB")
            yield text


def train(texts: Iterable[str], *, vocab_size: int, min_frequency: int) -> Tokenizer:
    """Train a tokenizer on `texts`.

    Args:
        texts: documents, read once.
        vocab_size: number of ids, special tokens included; fewer if the text has fewer pairs.
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


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the two files into `folder`, complete or not at all; other files there stay."""
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
            # The config first: it is the same for every tokenizer, so no mixture can appear.
            for name in ("tokenizer_config.json", "tokenizer.json"):
                os.replace(partial / name, folder / name)
        else:
            os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def log(message: str) -> None:
    """One line of progress."""
    print(message, file=sys.stderr, flush=True)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(
        description="Train a byte-level BPE tokenizer, offline.", allow_abbrev=False
    )
    parser.add_argument(
        "--input", nargs="+", required=True, help=".txt files are plain text, others JSON lines"
    )
    parser.add_argument("--json-key", default="text", help="key of the text in JSON lines")
    parser.add_argument(
        "--vocab-size", type=int, default=16384, help="ids, special tokens included"
    )
    parser.add_argument("--min-frequency", type=int, default=2, help="rarer pairs are not merged")
    parser.add_argument("--output", required=True, help="folder of the tokenizer")
    args = parser.parse_args(argv)
    if args.vocab_size < SMALLEST_VOCAB:
        raise ConfigError(
            f"--vocab-size {args.vocab_size} has no room for 256 bytes and {len(SPECIAL_TOKENS)} "
            f"special tokens; give at least {SMALLEST_VOCAB}"
        )
    if args.min_frequency < 1:
        raise ConfigError(f"--min-frequency {args.min_frequency} is less than 1; give at least 1")
    if os.path.exists(args.output) and not os.path.isdir(args.output):
        raise ConfigError(f"--output {args.output} is a file; give the path of a folder")
    check_inputs(args.input)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool with the arguments of the command line."""
    args = parse_arguments(argv)
    start = time.monotonic()
    sample = Sample(read_texts(args.input, args.json_key))
    log(f"reading {' '.join(args.input)}")
    tokenizer = train(sample, vocab_size=args.vocab_size, min_frequency=args.min_frequency)
    if not sample.num_bytes:
        raise ConfigError(f"--input {' '.join(args.input)} holds no text; give files with text")
    size = tokenizer.get_vocab_size()
    log(f"trained on {sample.num_bytes / 1e6:.1f} MB in {time.monotonic() - start:.1f} s")
    if size < args.vocab_size:
        log(f"the text has too few frequent pairs for {args.vocab_size} ids: {size} were made")
    save(tokenizer, Path(args.output))
    tokens = sum(len(item.ids) for item in tokenizer.encode_batch(sample.kept))
    size_read = sum(len(text.encode()) for text in sample.kept)
    print(
        f"{args.output}: {size} ids; {size_read / tokens:.2f} bytes per token "
        f"({tokens / size_read:.3f} tokens per byte) on {size_read / 1e6:.1f} MB of the input"
    )
    return 0


if __name__ == "__main__":
    run_command(main)
