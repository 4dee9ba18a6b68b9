"""Write the index files of a run before it starts.

Enters: the flags of `megatron_sffn.pretrain`. Leaves: Megatron's index files, so that no rank of
the run computes or waits for them. The work is in `megatron_sffn/data/loading/index_cache.py`.
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
Write the index files that say in what order a run reads its data: for every data set and blend, for
training, validation and test. They go to --data-cache-path, or beside the data sets. Give it the
flags of the run, all of them: the files depend on data paths, --split, --seq-length, --seed, the
tokenizer, and on how many samples training and evaluation draw. Files that are there and whole
stay.
"""

EXAMPLE = """\
example: once, before a run of 512 ranks
  .venv/bin/python tools/build_index_cache.py --ranks 512 [the flags of the run] \\
      --data-cache-path /shared/cache

example: a disk in each node (a run also does so by itself, when it starts)
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
    """The run's namespace, as its first rank has it."""
    from megatron_sffn.patches import prepare

    defaults, _ = prepare()  # before Megatron is imported

    from megatron_sffn.train.arguments import parse

    logging.getLogger("megatron").setLevel(logging.WARNING)
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(ranks))
    sys.argv = ["pretrain", *flags]
    with contextlib.redirect_stdout(io.StringIO()):  # Megatron's account of what it derives
        return parse(defaults)


def report(done: int, missing: int, one: IndexSet) -> None:
    """A line of progress."""
    say(f"written {done} of {missing}: {one.title}")


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
    where = args.data_cache_path or "the folders of the data sets"
    seconds = time.monotonic() - start
    print(f"{sets} sets of index files in {where}, {missing} of them new ({seconds:.1f} s)")
    return 0


if __name__ == "__main__":
    run_command(main)
