"""Defines the two pretraining runs of the quick start: flags, commands and results.

Inputs: a folder, a seed, a number of iterations. Outputs: the commands, which a user can copy.

Design notes: the runs differ only in the flags of the feed-forward layer, and a token has the same
number of active cells in both, so that a difference of the losses is due to the sparse layers.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_sffn.study.running.launch import STOP_SECONDS

RANKS = 2
VOCAB_SIZE = 4096
TRAIN_ITERS = 300

COMMON = (
    # The model: 4 layers of width 128, 256 active cells in each.
    "--num-layers 4 --hidden-size 128 --num-attention-heads 4 --ffn-hidden-size 256",
    "--seq-length 256 --max-position-embeddings 256 --position-embedding-type rope",
    "--normalization RMSNorm --disable-bias-linear --init-method-std 0.05",
    # Training takes less than one epoch, so dropout is not needed.
    "--attention-dropout 0 --hidden-dropout 0",
    # Steps of 2048 tokens, half of them on each rank.
    "--micro-batch-size 4 --global-batch-size 8",
    "--lr 3e-3 --min-lr 1e-4 --lr-decay-style cosine --lr-warmup-fraction 0.05",
    "--adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0",
    # Every evaluation reads all of the held-out text, sample by sample.
    "--full-validation --multiple-validation-sets",
    "--eval-micro-batch-size 1 --eval-global-batch-size 2",
    # On a small model, processes that load data cost more than they save.
    "--num-workers 0 --no-create-attention-mask-in-dataloader",
    # Ctrl-C saves at the end of the step and exits.
    "--exit-signal SIGINT",
    # Only the newest checkpoint is kept.
    "--save-interval 100 --save-retain-interval 1000000",
    "--log-interval 10",
)
"""Megatron's flags of both runs, except paths, seed and number of steps."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One pretraining.

    Args:
        name: name of its folder.
        title: title in tables and charts.
        flags: flags of the feed-forward layer and its parallelism.
    """

    name: str
    title: str
    flags: str


RUNS = (
    Run(name="dense", title="dense", flags="--sffn-router dense"),
    Run(
        name="avg-k",
        title="Avg-K",
        flags="--sffn-router avg-k --sffn-block-size 32 --sffn-expansion 16 "
        "--expert-model-parallel-size 2",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The settings that the runs of a quick start have in common.

    Args:
        folder: folder of all results.
        seed: seed of the weights and of the order of the data.
        train_iters: steps of each run.
    """

    folder: Path
    seed: int
    train_iters: int

    def folder_of(self, run: Run) -> Path:
        """The folder of a run's results."""
        return self.folder / run.name

    def flags(self, run: Run) -> list[str]:
        """All flags of a run, as lines of the command."""
        folder = shlex.quote(str(self.folder_of(run)))
        data = shlex.quote(str(self.folder / "data"))
        return [
            run.flags,
            *COMMON,
            # This gives three evaluations: Megatron adds one after the last step.
            f"--train-iters {self.train_iters} --eval-interval {self.train_iters // 3 + 1}",
            f"--seed {self.seed}",
            f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {data}/tokenizer",
            f"--train-data-path {data}/train_text_document",
            f"--valid-data-path {data}/valid_text_document --data-cache-path {data}/cache",
            f"--save {folder} --load {folder} --tensorboard-dir {folder}/tensorboard",
        ]

    def command(self, run: Run, python: str) -> list[str]:
        """The command of a run for `subprocess`, with the torchrun of this interpreter."""
        flags = [word for line in self.flags(run) for word in shlex.split(line)]
        return [python, "-m", "torch.distributed.run", *shlex.split(LAUNCH), *flags]

    def shown(self, run: Run) -> str:
        """The same command in the form that a user types."""
        start = LAUNCH.replace(" -m ", " \\\n    -m ")
        lines = [f"OMP_NUM_THREADS=1 {program('torchrun')} {start}", *self.flags(run)]
        return " \\\n    ".join(lines)

    def summary(self, run: Run) -> dict[str, object] | None:
        """The summary of a finished run; None if it has not finished."""
        try:
            summary = json.loads((self.folder_of(run) / "summary.json").read_text())
        except (OSError, ValueError):
            return None
        expected = {"iterations": self.train_iters, "seed": self.seed}
        actual = {key: summary.get(key) for key in expected}
        return summary if actual == expected else None

    def saved_iteration(self, run: Run) -> int:
        """The iteration of a run's newest checkpoint; 0 if there is none."""
        path = self.folder_of(run) / "latest_checkpointed_iteration.txt"
        try:
            return int(path.read_text())
        except (OSError, ValueError):
            return 0


# With --local-addr the host name of this machine does not have to resolve.
LAUNCH = f"--standalone --local-addr 127.0.0.1 --nproc-per-node {RANKS} -m megatron_sffn.pretrain"


def program(name: str) -> str:
    """A program of this environment as a user types it: its path in a clone, else its name."""
    return f".venv/bin/{name}" if Path(".venv").resolve() == Path(sys.prefix).resolve() else name


def environment() -> dict[str, str]:
    """The environment variables of a run, the same on every machine with or without GPUs."""
    return {
        **os.environ,
        # Each of the two ranks uses one core; more threads would compete for the cores.
        "OMP_NUM_THREADS": "1",
        # NCCL would need a GPU for each of the two ranks.
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONUNBUFFERED": "1",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(STOP_SECONDS),
    }
