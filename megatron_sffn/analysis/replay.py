"""The first validation tokens of a run once more, through each of its checkpoints.

Enters: the folder of a run. Leaves: a `RoutingTrace` for each checkpoint, of the same tokens, in a
folder where they are found again.

Choices
- The run's own command line, which its checkpoints hold, is started again as one process that only
  evaluates: data, tokenizer and model are those of the run, and a checkpoint loads on any layout.
  Flags that cut the model over ranks, or that write into the run's folder, are taken out.
- A recording that is there is used again, unless its checkpoint was written after it. How many
  tokens are asked for enters Megatron's shuffling, so it is part of the name.
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
from megatron_sffn.checkpoints.pickle_scan import NOT_FROM_A_CHECKPOINT, without
from megatron_sffn.train.routing_trace import RoutingTrace
from megatron_sffn.utils.errors import ConfigError, reason_in

LAYOUT = """
    tensor-model-parallel-size pipeline-model-parallel-size context-parallel-size
    expert-model-parallel-size expert-tensor-parallel-size sequence-parallel
    hierarchical-context-parallel-sizes cp-comm-type num-layers-per-virtual-pipeline-stage
    num-virtual-stages-per-pipeline-rank microbatch-group-size-per-virtual-pipeline-stage
    pipeline-model-parallel-layout decoder-first-pipeline-num-layers
    decoder-last-pipeline-num-layers account-for-embedding-in-pipeline-split
    account-for-loss-in-pipeline-split overlap-p2p-communication-warmup-flush
    no-overlap-p2p-communication use-distributed-optimizer num-distributed-optimizer-instances
    overlap-grad-reduce overlap-param-gather overlap-param-gather-with-optimizer-step
    use-precision-aware-optimizer tp-comm-overlap overlap-moe-expert-parallel-comm
    defer-embedding-wgrad-compute delay-wgrad-compute
"""
"""Flags without which the command is one of one rank."""

RESULTS = """
    load ckpt-step save save-interval save-retain-interval async-save non-persistent-save-interval
    non-persistent-ckpt-type tensorboard-dir wandb-project wandb-exp-name wandb-save-dir
    wandb-entity eval-iters eval-micro-batch-size eval-global-batch-size full-validation
    multiple-validation-sets validation-set-names skip-train sffn-record-routing
"""
"""Flags of what a run reads and leaves, which the replay sets itself."""

TAKEN_OUT = NOT_FROM_A_CHECKPOINT.union(f"--{name}" for name in (LAYOUT + RESULTS).split())


@dataclass(frozen=True, kw_only=True)
class Replay:
    """Makes the recordings of one run.

    Args:
        run: its folder.
        folder: of the recordings.
        tokens: how many of the first validation tokens to record.
        extra: flags after those of the run.
        say: told what is done.
    """

    run: Path
    folder: Path
    tokens: int
    extra: Sequence[str] = ()
    say: Callable[[str], None] = print

    def recording(self, iteration: int, args: Namespace) -> RoutingTrace:
        """The first tokens and their blocks, recorded now or before.

        Args:
            iteration: of the checkpoint.
            args: the checkpoint's.

        Raises:
            ConfigError: if the run's command does not evaluate it.
        """
        path = self.folder / f"iter_{iteration:07d}_tokens_{self.tokens}.npz"
        saved = (iteration_folder(self.run, iteration) / "metadata.json").stat().st_mtime
        if path.exists() and path.stat().st_mtime > saved:
            self.say(f"iteration {iteration}: {path}")
        else:
            self.say(f"iteration {iteration}: replaying {self.tokens} tokens")
            self._run(iteration, args, path)
        found = RoutingTrace.load(path)
        return RoutingTrace(
            token_ids=found.token_ids[: self.tokens],
            blocks={layer: blocks[: self.tokens] for layer, blocks in found.blocks.items()},
            num_blocks=found.num_blocks,
        )

    def _run(self, iteration: int, args: Namespace, path: Path) -> None:
        with tempfile.TemporaryDirectory() as results:
            done = subprocess.run(
                [
                    *(sys.executable, "-m", "megatron_sffn.pretrain"),
                    *self._command(iteration, args, path, results),
                ],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env=alone(os.environ),
            )
        remedy = "add flags for it after --, such as another --data-path"
        if done.returncode:
            raise ConfigError(
                f"replaying iteration {iteration} failed ({reason_in(done.stdout)}); {remedy}"
            )
        if not path.exists():
            raise ConfigError(
                f"the run of {self.run} has no validation data, so nothing was recorded; {remedy}"
            )

    def _command(self, iteration: int, args: Namespace, path: Path, results: str) -> list[str]:
        batch = args.micro_batch_size
        return [
            *without(args.sffn_command, TAKEN_OUT),
            *("--sffn-block-size", str(args.sffn_block_size)),
            *("--load", str(self.run), "--ckpt-step", str(iteration)),
            *("--save", results, "--save-interval", str(1 << 30)),
            *("--skip-train", "--no-load-optim", "--no-load-rng"),
            *("--eval-micro-batch-size", str(batch), "--eval-global-batch-size", str(batch)),
            *("--eval-iters", str(-(-self.tokens // (batch * args.seq_length)))),
            *("--sffn-record-routing", str(path.absolute())),
            *self.extra,
        ]


def alone(environment: os._Environ[str]) -> dict[str, str]:
    """The environment of a process that is no rank of a job."""
    of_a_job = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in environment.items() if name not in of_a_job}


def checkpoints(
    run: Path, wanted: Sequence[int] | None, say: Callable[[str], None]
) -> dict[int, Namespace]:
    """Iteration -> arguments of the checkpoints to replay, ascending.

    Args:
        run: the folder.
        wanted: iterations; None for all that are whole.
        say: told of those that are not.

    Raises:
        ConfigError: if there are none, one that is wanted is missing or damaged, or they cannot be
            replayed.
    """
    held = iterations(run)
    known = ", ".join(map(str, held)) or "none"
    for iteration in wanted or []:
        if iteration not in held:
            raise ConfigError(
                f"--iterations {iteration} is no checkpoint in {run} (there are: {known}); use one "
                "of those"
            )
    found = {}
    for iteration in sorted(wanted or held):
        folder = iteration_folder(run, iteration)
        problem = problem_of(folder) if is_torch_dist(folder) else "it is not in torch_dist format"
        if problem is None:
            found[iteration] = args_in(read_common(folder))
        elif wanted:
            raise ConfigError(f"checkpoint {folder} cannot be replayed: {problem}; leave it out")
        else:
            say(f"iteration {iteration}: left out, {problem}")
    if not found:
        raise ConfigError(
            f"{run} holds no checkpoint to replay (iterations there: {known}); train with --save "
            "and --save-interval"
        )
    for iteration, args in found.items():
        if vars(args).get("sffn_router", "dense") == "dense":
            raise ConfigError(f"the run in {run} is dense: no token chooses blocks; give another")
        if "sffn_command" not in vars(args):
            raise ConfigError(
                f"checkpoint {iteration} in {run} does not hold the command line of its run, so it "
                "cannot be replayed; save one with this version"
            )
    return found


def check_same_tokens(recordings: dict[int, RoutingTrace]) -> None:
    """All recordings are of the same tokens.

    Raises:
        ConfigError: if the data changed in between.
    """
    (first, one), *others = recordings.items()
    for iteration, other in others:
        if not numpy.array_equal(one.token_ids, other.token_ids):
            raise ConfigError(
                f"the validation tokens of iterations {first} and {iteration} differ, so the run's "
                "data or seed changed in between; name those that agree with --iterations"
            )
