"""Merges Megatron data sets into one.

The implementation is in `data/indexed/merge.py`.

Inputs: `.bin/.idx` pairs. Outputs: one pair with all documents, in order.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from megatron_sffn.data.indexed.merge import merge, merged_weight, open_blend
from megatron_sffn.data.output.progress import Progress
from megatron_sffn.utils.errors import CommandParser, ConfigError, run_command

DESCRIPTION = """\
Merge Megatron data sets (.bin and .idx) into one. Documents keep their order, and the result has
the bytes that Megatron's builder would write. Memory does not grow with tokens or documents, and a
data set may have any size. The write is atomic: the result appears under its name when it is
complete, and a kill leaves only a .partial folder, which the next run removes.
"""

EXAMPLE = """\
example: all data sets of a folder, sorted by name, as Megatron-LM's tool does
  .venv/bin/python tools/merge_datasets.py --input data/shards --output-prefix data/corpus

example: prefixes and globs, in this order (quoted, so that the tool expands them)
  .venv/bin/python tools/merge_datasets.py --output-prefix data/corpus \\
      --input 'data/web_*_text_document' data/books_text_document

example: data sets of a blend with their weights, as in --data-path; merging keeps a blend only if
its weights are in proportion to the tokens, which is checked
  .venv/bin/python tools/merge_datasets.py --output-prefix data/web \\
      --input 0.2 data/web_a_text_document 0.4 data/web_b_text_document
"""


def build_parser() -> argparse.ArgumentParser:
    """Megatron-LM's flags, and ours."""
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
        help="folders, prefixes (paths without .bin and .idx) and globs of prefixes, in order; "
        "either each of them or none has a weight before it",
    )
    add("--output-prefix", required=True, metavar="P", help="writes P.bin and P.idx")
    add("--overwrite", action="store_true", help="replace existing P.bin and P.idx")
    add(
        "--multimodal",
        action="store_true",
        help="not available: only sets of text can be merged",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool with the arguments of the command line."""
    args = build_parser().parse_args(argv)
    if args.multimodal:
        raise ConfigError(
            "--multimodal is not available, only sets of text are merged; leave it out"
        )
    blend = open_blend(args.input)
    weight = merged_weight(blend)
    indices = [index for group, _ in blend for index in group]
    progress = Progress("copied", sum(index.num_bytes for index in indices))
    merged = merge(indices, args.output_prefix, overwrite=args.overwrite, progress=progress.add)
    print(
        f"{merged.prefix}: {merged.num_documents} documents, {merged.num_tokens} tokens "
        f"({merged.dtype}) of {len(indices)} data sets; {progress.summary()}"
    )
    if weight is not None:
        print(f"in a blend: {weight:g} {merged.prefix}")
    return 0


if __name__ == "__main__":
    run_command(main)
