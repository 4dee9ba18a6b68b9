"""Records how each checkpoint of a run routes the same first validation tokens.

Inputs: the folder of a run. Outputs: a `RoutingTrace` for each checkpoint, also as a file in a
folder, from which it is read the next time.

Design notes:
- The run's command line, which is stored in its checkpoints, is started again as one process that
  only evaluates. So data, tokenizer and model are those of the run, and the checkpoint is resharded
  on load. Flags that shard the model or that write into the run's folder are removed.
- A file is used again unless its checkpoint is newer. The number of tokens is part of its name,
  since Megatron's shuffling depends on it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy

from megatron_sffn.checkpoints.files import (
    args_in,
    is_torch_dist,
    iteration_folder,
    iterations,
    problem_of,
    read_common,
)
from megatron_sffn.checkpoints.pickle_scan import without
from megatron_sffn.checkpoints.run_command import LAYOUT, RESULTS, flags_of
from megatron_sffn.train.routing_trace import RoutingTrace
from megatron_sffn.utils.errors import ConfigError, reason_in

REMOVED = flags_of(LAYOUT, RESULTS)
"""Flags that the replay sets itself or removes."""


@dataclass(frozen=True, kw_only=True)
class Replay:
    """Records the checkpoints of one run.

    Args:
        run: the run's folder.
        folder: folder of the recordings.
        tokens: number of validation tokens to record.
        extra: flags that are added to those of the run.
        say: called with a line about each checkpoint.
    """

    run: Path
    folder: Path
    tokens: int
    extra: Sequence[str] = ()
    say: Callable[[str], None] = print

    def recording(self, iteration: int, args: Namespace) -> RoutingTrace:
        """The first tokens and their blocks, from a file or recorded now.

        Args:
            iteration: the checkpoint's iteration.
            args: the checkpoint's arguments.

        Raises:
            ConfigError: if the run's command cannot evaluate the checkpoint.
        """
        path = self.folder / f"iter_{iteration:07d}_tokens_{self.tokens}.npz"
        saved = (iteration_folder(self.run, iteration) / "metadata.json").stat().st_mtime
        if path.exists() and path.stat().st_mtime > saved:
            self.say(f"iteration {iteration}: {path}")
        else:
            self.say(f"iteration {iteration}: replaying {self.tokens} tokens")
            self._run(iteration, args, path)
        trace = RoutingTrace.load(path)
        return RoutingTrace(
            token_ids=trace.token_ids[: self.tokens],
            blocks={layer: blocks[: self.tokens] for layer, blocks in trace.blocks.items()},
            num_blocks=trace.num_blocks,
        )

    def _run(self, iteration: int, args: Namespace, path: Path) -> None:
        with tempfile.TemporaryDirectory() as results:
            process = subprocess.run(
                [
                    *(sys.executable, "-m", "megatron_sffn.pretrain"),
                    *self._command(iteration, args, path, results),
                ],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env=without_rank(os.environ),
            )
        remedy = "add flags for it after --, such as another --data-path"
        if process.returncode:
            raise ConfigError(
                f"replaying iteration {iteration} failed ({reason_in(process.stdout)}); {remedy}"
            )
        if not path.exists():
            raise ConfigError(
                f"the run of {self.run} has no validation data, so nothing was recorded; {remedy}"
            )

    def _command(self, iteration: int, args: Namespace, path: Path, results: str) -> list[str]:
        batch = args.micro_batch_size
        return [
            *without(args.sffn_command, REMOVED),
            *("--sffn-block-size", str(args.sffn_block_size)),
            *("--load", str(self.run), "--ckpt-step", str(iteration)),
            *("--save", results, "--save-interval", str(1 << 30)),
            *("--skip-train", "--no-load-optim", "--no-load-rng"),
            *("--eval-micro-batch-size", str(batch), "--eval-global-batch-size", str(batch)),
            *("--eval-iters", str(-(-self.tokens // (batch * args.seq_length)))),
            *("--sffn-record-routing", str(path.absolute())),
            *self.extra,
        ]


def without_rank(environment: os._Environ[str]) -> dict[str, str]:
    """The environment without the variables of a rank, for a process that is its own job."""
    job_variables = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in environment.items() if name not in job_variables}


def checkpoints(
    run: Path, requested: Sequence[int] | None, say: Callable[[str], None]
) -> dict[int, Namespace]:
    """Iteration -> arguments of the checkpoints to replay, ascending.

    Args:
        run: the run's folder.
        requested: iterations; None for all complete ones.
        say: called with a line about each iteration that is not complete.

    Raises:
        ConfigError: if there are none, if a requested one is missing or damaged, or if they cannot
            be replayed.
    """
    saved = iterations(run)
    known = ", ".join(map(str, saved)) or "none"
    for iteration in requested or []:
        if iteration not in saved:
            raise ConfigError(
                f"--iterations {iteration} is no checkpoint in {run} (there are: {known}); use one "
                "of those"
            )
    args_of = {}
    for iteration in sorted(requested or saved):
        folder = iteration_folder(run, iteration)
        problem = problem_of(folder) if is_torch_dist(folder) else "it is not in torch_dist format"
        if problem is None:
            args_of[iteration] = args_in(read_common(folder))
        elif requested:
            raise ConfigError(f"checkpoint {folder} cannot be replayed: {problem}; leave it out")
        else:
            say(f"iteration {iteration}: left out, {problem}")
    if not args_of:
        raise ConfigError(
            f"{run} holds no checkpoint to replay (iterations there: {known}); train with --save "
            "and --save-interval"
        )
    for iteration, args in args_of.items():
        if vars(args).get("sffn_router", "dense") == "dense":
            raise ConfigError(f"the run in {run} is dense: no token chooses blocks; give another")
        if "sffn_command" not in vars(args):
            raise ConfigError(
                f"checkpoint {iteration} in {run} does not hold the command line of its run, so it "
                "cannot be replayed; save one with this version"
            )
    return args_of


def check_same_tokens(recordings: dict[int, RoutingTrace]) -> None:
    """Check that all recordings are of the same tokens.

    Raises:
        ConfigError: if the data changed in between.
    """
    (first, first_trace), *later = recordings.items()
    for iteration, trace in later:
        if not numpy.array_equal(first_trace.token_ids, trace.token_ids):
            raise ConfigError(
                f"the validation tokens of iterations {first} and {iteration} differ, so the run's "
                "data or seed changed in between; name those that agree with --iterations"
            )
