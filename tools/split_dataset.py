"""Splits a corpus into train, valid and test.

The implementation is in `data/corpus/split.py`.

Inputs: text, or `.bin/.idx` pairs. Outputs: the same format, in a file or pair for each part.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from megatron_sffn.data.corpus.split import (
    Count,
    Parts,
    dataset_contents,
    parse_parts,
    split_datasets,
    split_text,
    text_contents,
)
from megatron_sffn.data.indexed.find import check_same_type, open_datasets
from megatron_sffn.data.output.progress import Progress
from megatron_sffn.data.text.sources import find_sources, total_size
from megatron_sffn.utils.errors import CommandParser, ConfigError, run_command
from megatron_sffn.utils.human_size import human_size
from megatron_sffn.utils.stderr import say

DESCRIPTION = """\
Split a corpus into parts. A hash of the content of a document determines its part. So a document is
in the same part in every file, order and version of the corpus, on every machine, and so are its
exact copies: no held-out document is in the training text. Reads text (.jsonl, .txt, .parquet,
compressed or not; files, folders, globs, - for standard input) and writes JSON lines; with
--tokenized reads and writes Megatron data sets. Split text rather than ids where you can: with
another tokenizer the same documents are then held out.
"""

EXAMPLE = """\
example: corpus_train.jsonl, corpus_valid.jsonl, corpus_test.jsonl
  .venv/bin/python tools/split_dataset.py --input 'data/*.jsonl.gz' --output-prefix data/corpus \\
      --parts train=0.98,valid=0.01,test=0.01

example: corpus_train.bin and .idx, corpus_valid.bin and .idx
  .venv/bin/python tools/split_dataset.py --tokenized --input data/corpus_text_document \\
      --output-prefix data/corpus --parts train=99,valid=1
"""


def build_parser() -> argparse.ArgumentParser:
    """The tool's flags."""
    parser = CommandParser(
        description=DESCRIPTION,
        epilog=EXAMPLE,
    )
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        metavar="X",
        help="files, folders, globs, or - for standard input; with --tokenized prefixes (paths "
        "without .bin and .idx), folders, and globs of prefixes",
    )
    add(
        "--output-prefix",
        required=True,
        metavar="P",
        help="writes P_NAME.jsonl, or .bin and .idx",
    )
    add(
        "--parts",
        default="train=0.98,valid=0.01,test=0.01",
        metavar="NAME=SHARE,...",
        help="names and shares, relative to their sum (default: %(default)s)",
    )
    add(
        "--by",
        choices=("documents", "bytes"),
        default="documents",
        help="unit of the shares (default: documents); with documents the part of a document "
        "depends only on its content; with bytes the input is read twice, and the parts have their "
        "shares of bytes also if the lengths of documents differ much",
    )
    add("--seed", type=int, default=0, help="seed of the hash (default: 0)")
    add("--tokenized", action="store_true", help="split Megatron data sets instead of text")
    add(
        "--json-key",
        default="text",
        help="key of the text to hash (default: text)",
    )
    add("--overwrite", action="store_true", help="replace existing files")
    return parser


def split(args: argparse.Namespace, parts: Parts) -> tuple[list[Count], Progress]:
    """Split the input; returns the sizes of the parts and the progress."""
    if args.tokenized:
        indices = [index for group in open_datasets(args.input) for index in group]
        check_same_type(indices)
        if args.by == "bytes":
            parts = parts.by_bytes(dataset_contents(indices))
        progress = Progress("split", sum(index.num_bytes for index in indices))
        counts = split_datasets(
            indices, parts, args.output_prefix, overwrite=args.overwrite, progress=progress.add
        )
    else:
        sources = find_sources(args.input, [args.json_key], say)
        if args.by == "bytes":
            if total_size(sources) is None:
                raise ConfigError(
                    f"--by bytes reads --input {' '.join(args.input)} twice, and a pipe can be "
                    "read once; give files, or --by documents"
                )
            parts = parts.by_bytes(text_contents(sources, args.json_key))
        progress = Progress("split", total_size(sources))
        counts = split_text(
            sources,
            args.json_key,
            parts,
            args.output_prefix,
            overwrite=args.overwrite,
            progress=progress.reach,
        )
    return counts, progress


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool with the arguments of the command line."""
    args = build_parser().parse_args(argv)
    counts, progress = split(args, parse_parts(args.parts, args.seed))
    total = sum(count.documents for count in counts)
    for count in counts:
        tokens = "" if count.tokens is None else f", {count.tokens} tokens"
        print(
            f"{count.path}: {count.documents} documents ({count.documents / total:.2%}){tokens}, "
            f"{human_size(count.num_bytes)}"
        )
    print(progress.summary())
    return 0


if __name__ == "__main__":
    run_command(main)
