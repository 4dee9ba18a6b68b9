"""Converts a checkpoint to another block size, without training it again.

Inputs: the folder of a run, and the change. Outputs: a checkpoint of the same iteration in another
folder, from which training can resume with optimizer, schedule and random numbers.

Design notes: the conversion is one process without a model, so that a machine with a disk is
enough. The old checkpoint is evaluated before the conversion and the new one after it, with the
command line that the run stored in its checkpoint; the difference of the losses is the cost of the
conversion.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_sffn.utils.errors import CommandParser, ConfigError, reason_in, run_command
from megatron_sffn.utils.warning_filters import silence

if TYPE_CHECKING:
    from megatron_sffn.checkpoints.reblock import Reblocking

REBLOCK = """\
Convert a checkpoint to another block size. Keys and values are stored as rows of cells, so they
stay as they are; a learned gate, which has a row for every block, changes with the blocks.
Parameters, the optimizer's moments and everything else are kept: training resumes from the result,
on any layout, with the new --sffn-block-size.

A tensor is read in the pieces in which the ranks saved it; the largest piece has to fit in RAM.
"""

EXAMPLE = """\
example: from blocks of 64 cells to blocks of 16
  .venv/bin/python tools/convert_checkpoint.py reblock --load runs/g64 --save runs/g16 \\
      --block-size 16
  torchrun ... -m megatron_sffn.pretrain ... --sffn-block-size 16 --load runs/g16 --save runs/g16

example: evaluate on 1 rank a run on 8 ranks; flags after -- are added to the run's command
  .venv/bin/python tools/convert_checkpoint.py reblock --load runs/g64 --save runs/g16 \\
      --block-size 16 --nproc-per-node 1 -- --expert-model-parallel-size 1
"""

NAMES_OF_DATA = frozenset(
    f"--{name}"
    for name in (
        *("data-path", "train-data-path", "valid-data-path", "data-args-path"),
        *("per-split-data-args-path", "mock-data"),
    )
)
"""Flags of which a run that can be evaluated has one."""


def build_parser() -> argparse.ArgumentParser:
    """The tool's flags; one subcommand for each conversion."""
    parser = CommandParser(description="Convert a checkpoint, offline.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="CONVERSION")
    reblock_parser = commands.add_parser(
        "reblock",
        aliases=["regranulate"],  # its former name
        help="another block size for the same cells",
        description=REBLOCK,
        epilog=EXAMPLE,
        usage="convert_checkpoint.py reblock --load DIR --save DIR --block-size G [options] "
        "[-- TRAINING FLAGS]",
    )
    add = reblock_parser.add_argument
    add("--load", type=Path, required=True, metavar="DIR", help="folder of the run")
    add(
        "--ckpt-step",
        type=int,
        metavar="N",
        help="iteration to convert (default: the one that training would load)",
    )
    add(
        "--save",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of the result, which has the same iteration; it is created if necessary",
    )
    add("--block-size", type=int, required=True, metavar="G", help="new --sffn-block-size")
    add(
        "--no-evaluate",
        dest="evaluate",
        action="store_false",
        help="do not compare the validation losses before and after",
    )
    add(
        "--sffn-trust-checkpoint",
        action="store_true",
        help="read a checkpoint that names code other than torch's and Megatron's classes, as old "
        "checkpoints do, and let this code run",
    )
    add(
        "--nproc-per-node",
        type=int,
        metavar="N",
        help="ranks of the evaluation (default: as many as the run had); give the layout after --",
    )
    return parser


def reblock(args: Namespace, training_flags: Sequence[str]) -> None:
    """Run the subcommand.

    Args:
        args: its flags.
        training_flags: added to the run's command for the evaluation.

    Raises:
        ConfigError: if the checkpoint is damaged, the block size is impossible for it, or it cannot
            be evaluated.
    """
    from tqdm import tqdm

    from megatron_sffn.checkpoints import files, rewrite
    from megatron_sffn.checkpoints.reblock import plan_reblocking
    from megatron_sffn.checks.pickles import check_data_only
    from megatron_sffn.patches.unpickling import trust

    if args.sffn_trust_checkpoint:
        trust()
    source = _source(args.load, args.ckpt_step)
    check_data_only(source)
    common, metadata = files.read_whole(source), files.read_metadata(source)
    saved = files.args_in(common)
    if "sffn_router" not in vars(saved):
        raise ConfigError(
            f"checkpoint {source} was saved by plain Megatron and has no sparse layers; give one "
            "that megatron_sffn.pretrain saved"
        )
    iteration = files.iteration_of(source)
    target = rewrite.free_folder(args.save, iteration)
    plan = plan_reblocking(metadata, saved, args.block_size)
    loss_before = None
    if args.evaluate:
        evaluation = Evaluation(args, saved, training_flags)
        loss_before = evaluation.loss_of(source, plan.before.block_size)
    start = time.monotonic()
    size = sum(item.length for item in metadata.storage_data.values())
    with tqdm(total=size, unit="B", unit_scale=True, disable=None, desc="writing") as bar:
        rewrite.rewrite(
            source,
            args.save,
            iteration,
            changes=plan.changes,
            common={**common, "args": plan.args},
            progress=bar.update,
        )
    print(f"{source} -> {target}, {size / 1e6:.1f} MB in {time.monotonic() - start:.1f} s")
    print(described(plan), flush=True)
    if loss_before is not None:
        loss_after = evaluation.loss_of(target, plan.after.block_size)
        print(
            f"validation loss  before {loss_before:.4f}  after {loss_after:.4f}  "
            f"({loss_after - loss_before:+.4f})"
        )


def _source(load: Path, step: int | None) -> Path:
    """The checkpoint that `--load` and `--ckpt-step` name."""
    from megatron_sffn.checkpoints.files import folder_to_load, is_torch_dist

    source = folder_to_load(load, step)
    if source is None:
        raise ConfigError(
            f"--load {load} has no latest_checkpointed_iteration.txt; give the folder that a run "
            "was saved in, or --ckpt-step N"
        )
    if source.name == "release" or not is_torch_dist(source):
        raise ConfigError(
            f"checkpoint {source} is not an iteration in the torch_dist format; save it with "
            "--ckpt-format torch_dist, which is the default"
        )
    return source


def described(plan: Reblocking) -> str:
    """The report: the sizes, a table of all entries of the checkpoint, and the consequence."""
    before, after = plan.before, plan.after
    rows = [("what", "number", "what happened")]
    rows += [(kind, str(number), effect) for (kind, effect), number in sorted(plan.account.items())]
    width = max(len(row[0]) for row in rows)
    return "\n".join(
        [
            f"block size {before.block_size} -> {after.block_size}: {after.num_blocks} blocks "
            f"instead of {before.num_blocks}, {after.num_active_blocks} per token instead of "
            f"{before.num_active_blocks}, {after.num_cells} cells as before",
            *(f"  {kind:{width}}  {number:>6}  {effect}" for kind, number, effect in rows),
            *plan.consequences,
        ]
    )


class Evaluation:
    """Validation losses with the command line that a run stored in its checkpoint.

    Args:
        args: the tool's flags.
        saved: the checkpoint's arguments.
        training_flags: flags at the end of the command line, where they override earlier ones.

    Raises:
        ConfigError: if the checkpoint has no such command line.
    """

    def __init__(self, args: Namespace, saved: Namespace, training_flags: Sequence[str]) -> None:
        from megatron_sffn.checkpoints.pickle_scan import NOT_FROM_A_CHECKPOINT, without

        if "sffn_command" not in vars(saved):
            raise ConfigError(
                f"the checkpoint in --load {args.load} does not hold the command line of its run, "
                "so it cannot be evaluated; add --no-evaluate"
            )
        self.command = without(saved.sffn_command, NOT_FROM_A_CHECKPOINT)
        if not NAMES_OF_DATA & {
            word.partition("=")[0] for word in (*self.command, *training_flags)
        }:
            raise ConfigError(
                f"the checkpoint in --load {args.load} names no data, as imports do not, so it "
                "cannot be evaluated; add --no-evaluate, or data after --"
            )
        self.ranks: int = args.nproc_per_node or saved.world_size
        self.training_flags = training_flags

    def loss_of(self, folder: Path, block_size: int) -> float:
        """The validation loss of a checkpoint; nothing is written into the run's folders.

        Args:
            folder: the iteration's folder.
            block_size: its block size.

        Raises:
            ConfigError: if the run fails, or has no validation data.
        """
        from megatron_sffn.checkpoints.files import iteration_of

        with tempfile.TemporaryDirectory() as results:
            # argparse takes the last value of a flag, and no flag undoes --save.
            flags = ["--load", str(folder.parent), "--ckpt-step", str(iteration_of(folder))]
            flags += ["--save", results, "--sffn-block-size", str(block_size)]
            flags += ["--skip-train", "--no-load-optim", "--no-load-rng"]
            if any(word.startswith("--tensorboard-dir") for word in self.command):
                flags += ["--tensorboard-dir", f"{results}/tensorboard"]
            if any(word.startswith("--wandb-project") for word in self.command):
                flags += ["--wandb-project", ""]
            self._run([*self.command, *flags, *self.training_flags], folder)
            summary = json.loads((Path(results) / "summary.json").read_text())
        if summary["validation_loss"] is None:
            raise ConfigError(
                f"the run of {folder} has no validation data; add --no-evaluate, or data after --"
            )
        return float(summary["validation_loss"])

    def _run(self, flags: list[str], folder: Path) -> None:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        command = [sys.executable, *torchrun, str(self.ranks), "-m", "megatron_sffn.pretrain"]
        print(f"evaluating {folder} on {self.ranks} ranks", file=sys.stderr, flush=True)
        process = subprocess.run(
            [*command, *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={"OMP_NUM_THREADS": "1", **os.environ},
        )
        if process.returncode:
            raise ConfigError(
                f"evaluating {folder} on {self.ranks} ranks failed ({reason_in(process.stdout)}); "
                "give other flags after --, or --nproc-per-node, or add --no-evaluate"
            )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool with the arguments of the command line."""
    silence()
    words = list(sys.argv[1:] if argv is None else argv)
    separator = words.index("--") if "--" in words else len(words)
    args = build_parser().parse_args(words[:separator])
    if args.nproc_per_node is not None and args.nproc_per_node < 1:
        raise ConfigError(
            f"--nproc-per-node {args.nproc_per_node} must be at least 1; give a positive number"
        )

    from megatron_sffn.patches import prepare

    prepare()
    reblock(args, words[separator + 1 :])
    return 0


if __name__ == "__main__":
    run_command(main)
