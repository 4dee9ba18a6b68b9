"""Writes the index files of a run before it starts.

Inputs: the flags of `megatron_sffn.pretrain`. Outputs: Megatron's index files, so that no rank of
the run computes them or waits for them. The implementation is in
`megatron_sffn/data/loading/index_cache.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_sffn.utils.errors import CommandParser, ConfigError, run_command
from megatron_sffn.utils.stderr import say
from megatron_sffn.utils.warning_filters import silence

if TYPE_CHECKING:
    from megatron_sffn.data.loading.index_cache import IndexSet

DESCRIPTION = """\
Write the index files of a run, which hold the order of its samples, for every data set and blend,
for training, validation and test. They go to --data-cache-path, or beside the data sets. Give all
flags of the run: the files depend on data paths, --split, --seq-length, --seed, the tokenizer, and
the numbers of samples that training and evaluation draw. Complete files are kept.
"""

EXAMPLE = """\
example: once, before a run of 512 ranks
  .venv/bin/python tools/build_index_cache.py --ranks 512 [the flags of the run] \\
      --data-cache-path /shared/cache

example: local disks in each node (a run also writes these files when it starts)
  srun --ntasks-per-node 1 .venv/bin/python tools/build_index_cache.py --ranks 512 [flags] \\
      --data-cache-path /local/cache
"""


def build_parser() -> argparse.ArgumentParser:
    """The tool's own flags."""
    parser = CommandParser(
        prog="tools/build_index_cache.py",
        usage="tools/build_index_cache.py [--ranks N] [flags of megatron_sffn.pretrain]",
        description=DESCRIPTION,
        epilog=EXAMPLE,
    )
    parser.add_argument(
        "--ranks", type=int, default=1, metavar="N", help="ranks of the run (default: 1)"
    )
    return parser


def namespace_of(flags: list[str], ranks: int) -> Namespace:
    """The namespace of the run, as on its first rank."""
    from megatron_sffn.patches import prepare

    defaults, _ = prepare()  # before the first import of Megatron

    from megatron_sffn.train.arguments import parse

    logging.getLogger("megatron").setLevel(logging.WARNING)
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(ranks))
    sys.argv = ["pretrain", *flags]
    with contextlib.redirect_stdout(io.StringIO()):  # Megatron prints the values that it derives
        return parse(defaults)


def report(written: int, missing: int, index_set: IndexSet) -> None:
    """Print a line of progress."""
    say(f"written {written} of {missing}: {index_set.title}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool with the arguments of the command line."""
    silence()
    parser = build_parser()
    options, flags = parser.parse_known_args(argv)
    if options.ranks < 1:
        raise ConfigError(f"--ranks {options.ranks} must be at least 1; give a positive number")
    start = time.monotonic()
    args = namespace_of(flags, options.ranks)

    from megatron_sffn.checks.data import check_data
    from megatron_sffn.data.loading.gpt_dataset import dataset_request, samples_of_run
    from megatron_sffn.data.loading.index_cache import complete
    from megatron_sffn.data.tokenize.tokenizer import load_tokenizer

    check_data(args)
    if args.phase_transition_iterations:
        raise ConfigError(
            "--phase-transition-iterations has index files for each phase, which the run writes "
            "when a phase begins; leave it out, and this tool"
        )
    if args.mock_data and not args.data_cache_path:
        raise ConfigError("--mock-data without --data-cache-path has no index files; give data")
    with contextlib.redirect_stdout(io.StringIO()):
        request = dataset_request(args, load_tokenizer(args), samples_of_run(args))
    sets, missing = complete(request, report)
    folder = args.data_cache_path or "the folders of the data sets"
    seconds = time.monotonic() - start
    print(f"{sets} sets of index files in {folder}, {missing} of them new ({seconds:.1f} s)")
    return 0


if __name__ == "__main__":
    run_command(main)
