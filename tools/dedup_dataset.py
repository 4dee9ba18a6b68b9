"""Removes duplicate documents from text.

The implementation is in `data/corpus/dedup.py`.

Inputs: text. Outputs: JSON lines without the duplicates, and a report of the duplicates.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from megatron_sffn.data.corpus.dedup import dedup
from megatron_sffn.data.corpus.minhash import UNITS, MinHash
from megatron_sffn.data.output.progress import Progress
from megatron_sffn.data.text.sources import find_sources, total_size
from megatron_sffn.utils.errors import CommandParser, ConfigError, run_command
from megatron_sffn.utils.human_size import human_size
from megatron_sffn.utils.stderr import say

DESCRIPTION = """\
Remove documents that duplicate an earlier one: exact duplicates, up to white space and the Unicode
form of accents, and with --near also documents that share most of their n-grams with it. The first
of several duplicates stays. Reads text (.jsonl, .txt, .parquet, compressed or not; files, folders,
globs, - for standard input). Writes P.jsonl, and P_duplicates.jsonl with a line for each removed
document: its file and line, the reason, and the file and line of the document that stays. The same
input gives the same files.
"""

EXAMPLE = """\
memory: 250 bytes for each document that stays, 2.8 kB with --near, whatever its length

example: exact duplicates
  .venv/bin/python tools/dedup_dataset.py --input data/raw --output-prefix data/clean

example: near-duplicates, too (needs the extra `dedup`)
  .venv/bin/python tools/dedup_dataset.py --input data/raw --output-prefix data/clean --near

example: Chinese, Japanese and Thai have no spaces between words, so compare characters
  .venv/bin/python tools/dedup_dataset.py --input data/raw --output-prefix data/clean --near \\
      --unit characters --ngram 8
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
        help="files, folders, globs, or - for standard input, in order",
    )
    add("--output-prefix", required=True, metavar="P", help="writes P.jsonl and P_duplicates.jsonl")
    add("--json-key", default="text", help="key of the text to compare (default: text)")
    add("--near", action="store_true", help="also remove near-duplicates")
    threshold = "least share of common n-grams (Jaccard) of near-duplicates (default: 0.8)"
    add("--threshold", type=float, default=0.8, metavar="T", help=threshold)
    add("--ngram", type=int, default=5, metavar="N", help="length of an n-gram (default: 5)")
    add("--unit", choices=UNITS, default="words", help="unit of n-grams (default: words)")
    add(
        "--workers",
        type=int,
        metavar="N",
        help="processes that hash (default: the cores that this process may use)",
    )
    add("--overwrite", action="store_true", help="replace existing files")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool with the arguments of the command line."""
    args = build_parser().parse_args(argv)
    if args.workers is not None and args.workers < 1:
        raise ConfigError(f"--workers {args.workers} is less than 1; give a positive number")
    minhash = (
        MinHash(threshold=args.threshold, size=args.ngram, unit=args.unit) if args.near else None
    )
    sources = find_sources(args.input, [args.json_key], say)
    progress = Progress("compared", total_size(sources))
    result = dedup(
        sources,
        args.json_key,
        minhash,
        args.output_prefix,
        # Not os.cpu_count(): a container or a Slurm step may have fewer cores than the machine.
        workers=args.workers or len(os.sched_getaffinity(0)),
        overwrite=args.overwrite,
        progress=progress.reach,
    )
    exact, near = result.exact_duplicates, result.near_duplicates
    print(
        f"{result.path}: {result.kept} documents of {result.kept + exact + near}, "
        f"{human_size(result.kept_bytes)}\n"
        f"{result.report}: {exact} exact and {near} near-duplicates, "
        f"{human_size(result.left_out_bytes)}\n"
        f"{progress.summary()}"
    )
    return 0


if __name__ == "__main__":
    run_command(main)
