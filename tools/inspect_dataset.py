"""Inspects and checks Megatron data sets.

The implementation is in `data/indexed/stats.py`.

Inputs: `.bin/.idx` pairs. Outputs: their statistics on the terminal, as JSON and as a plot; or, for
a damaged file, one sentence and exit code 2.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_sffn.utils.errors import CommandParser, ConfigError, run_command
from megatron_sffn.utils.warning_filters import silence

if TYPE_CHECKING:
    from megatron_sffn.data.tokenize.tokenizer import Tokenizer

DESCRIPTION = """\
Show the content of Megatron data sets (.bin and .idx): number of documents and tokens, a histogram
of document lengths, the most frequent ids, and sample documents, decoded if a tokenizer is given.
Every entry of the index and every id is read, so truncated, mismatched and foreign files are found;
the tool then ends with one sentence and exit code 2. Memory does not grow with the data.
"""

EXAMPLE = """\
example:
  .venv/bin/python tools/inspect_dataset.py --input data/corpus_text_document --plot lengths.png \\
      --tokenizer-type HuggingFaceTokenizer --tokenizer-model tokenizer --samples 3

example: check that all shards are complete, without reading the ids
  .venv/bin/python tools/inspect_dataset.py --input data/shards --index-only
"""


def build_parser() -> argparse.ArgumentParser:
    """The tool's flags; those of the tokenizer are Megatron's."""
    from megatron.training.argument_utils import ArgumentGroupFactory
    from megatron.training.config import TokenizerConfig

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
        help="prefixes (paths without .bin and .idx), folders, and globs of prefixes; several are "
        "taken as one corpus",
    )
    add("--samples", type=int, default=2, metavar="N", help="sample documents to show (default: 2)")
    add("--sample-tokens", type=int, default=256, metavar="N", help="tokens of each (default: 256)")
    add("--seed", type=int, default=0, help="seed of the sample (default: 0)")
    add("--top", type=int, default=10, metavar="N", help="most frequent ids to show (default: 10)")
    add("--index-only", action="store_true", help="do not read the ids: seconds for terabytes")
    add("--json", type=Path, metavar="FILE", help="write all numbers as JSON")
    add("--plot", type=Path, metavar="FILE", help="plot the lengths as .png, .pdf or .svg")
    ArgumentGroupFactory(TokenizerConfig).build_group(parser, "tokenizer")
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse wrong flags before anything is read."""
    from megatron_sffn.data.indexed.stats_report import check_plot

    for flag, value in (("--samples", args.samples), ("--top", args.top)):
        if value < 0:
            raise ConfigError(f"{flag} {value} is less than 0; give 0 for none, or more")
    if args.sample_tokens < 1:
        raise ConfigError(f"--sample-tokens {args.sample_tokens} is less than 1; give more")
    if args.plot:
        check_plot(args.plot)
    if args.json and not args.json.parent.is_dir():
        raise ConfigError(f"--json {args.json} lies in no folder; create {args.json.parent} first")


def check_vocabulary(largest: int, tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer whose vocabulary lacks ids of the data sets."""
    if largest >= tokenizer.vocab_size:
        raise ConfigError(
            f"--input holds the id {largest}, but the tokenizer has {tokenizer.vocab_size} ids; "
            "give the tokenizer that made the data sets (--tokenizer-type, --tokenizer-model)"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool with the arguments of the command line."""
    silence()
    args = build_parser().parse_args(argv)
    check_arguments(args)

    from megatron_sffn.data.indexed import stats_report
    from megatron_sffn.data.indexed.find import open_datasets
    from megatron_sffn.data.indexed.stats import document_lengths, id_counts, samples
    from megatron_sffn.data.output.progress import Progress
    from megatron_sffn.data.tokenize.tokenizer import load_tokenizer
    from megatron_sffn.utils.atomic_files import atomic_write_text

    tokenizer = load_tokenizer(args) if args.tokenizer_type else None
    indices = [index for group in open_datasets(args.input) for index in group]
    lengths = document_lengths(indices)
    ids = None
    if not args.index_only:
        ids = id_counts(indices, Progress("read", sum(index.num_bytes for index in indices)).add)
    if tokenizer and ids is not None:
        check_vocabulary(len(ids) - 1, tokenizer)
    statistics = stats_report.Statistics(
        indices=indices,
        lengths=lengths,
        ids=ids,
        top=args.top,
        vocab_size=tokenizer.vocab_size if tokenizer else None,
        samples=[]
        if args.index_only
        else samples(indices, args.samples, args.seed, args.sample_tokens),
    )
    record = stats_report.as_record(statistics, tokenizer.detokenize if tokenizer else None)
    print("\n".join(stats_report.as_lines(record)))
    if args.plot:
        stats_report.plot(lengths, " ".join(args.input), args.plot)
    if args.json:
        atomic_write_text(args.json, json.dumps(record, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    run_command(main)
