"""The configurations of `examples/configs/`: their flags, and those flags as a run parses them.

Outputs: `CONFIGURATIONS`, one for each model that a script of that folder trains.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "configs"
UNIFIED, SIGMA, SMALL, LARGE = (
    "unified_sffn.sh",
    "sigma_moe.sh",
    "modern_1b.sh",
    "modern_30b.sh",
)

ONE_CELL = ("lorkm", "pkm-ffn", "pkm")
ROUTERS = ("avg-k", "vanilla-m", "switch", "rand-hash", *ONE_CELL)
SIGMA_MODELS = ("wt-s", "wt-s-star", "wt-m", "enwik8")
GRID = [
    (router, str(g), str(expansion))
    for router in ROUTERS
    for g in ((1,) if router in ONE_CELL else (4096, 2048, 1024, 256, 64, 1))
    for expansion in (4, 16)
]
ARGUMENTS: dict[str, list[tuple[str, ...]]] = {
    SMALL: [()],
    LARGE: [()],
    SIGMA: [
        (model, router)
        for router in ("sigma-moe", "dense", "switch", "s-base")
        for model in SIGMA_MODELS
    ],
    UNIFIED: [("dense",), *GRID],
}
"""Script -> the arguments of each of its configurations."""

SETTINGS = ("DATA", "SAVE", "NNODES", "GPUS_PER_NODE", "NODE_RANK", "TOY", "RUN")
CLEAN_ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in SETTINGS}
"""The environment without the variables that the scripts read."""


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """A model that one command trains.

    Args:
        script: file name in `examples/configs/`.
        arguments: of the script.
    """

    script: str
    arguments: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The script without its ending, and the arguments."""
        return " ".join([self.script.removesuffix(".sh"), *self.arguments])

    @property
    def line(self) -> str:
        """The command that trains it at full size."""
        return " ".join([f"examples/configs/{self.script}", *self.arguments])

    @property
    def is_dense(self) -> bool:
        """True if no layer of the model is sparse."""
        return "dense" in self.arguments

    @property
    def ranks(self) -> tuple[int, ...]:
        """Numbers of ranks for which the model is built: the script of a modern one has several."""
        return (8, 64, 1024) if self.script in (SMALL, LARGE) else (1,)

    def flags(self, *extra: str, **environment: str) -> list[str]:
        """The flags with which the script starts a run."""
        process = command(self.script, *self.arguments, *extra, **environment)
        process.check_returncode()
        return process.stdout.splitlines()

    def digest(self) -> str:
        """SHA-256 of the flags at full size and at toy size: it changes with the script."""
        lines = [*self.flags(), "toy", *self.flags(TOY="1")]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


CONFIGURATIONS = [
    Configuration(script=script, arguments=arguments)
    for script, all_arguments in ARGUMENTS.items()
    for arguments in all_arguments
]


def command(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script with `printf` in place of torchrun: it prints one flag per line."""
    return subprocess.run(
        [FOLDER / script, *arguments],
        env={**CLEAN_ENVIRONMENT, "RUN": "printf %s\\n", **environment},
        capture_output=True,
        text=True,
    )


def arguments_of(script: str, *arguments: str, ranks: int = 1) -> Namespace:
    """The parsed arguments of a configuration on the first rank of `ranks` GPUs."""
    from megatron_sffn.train.first_rank import parse_as_first_rank  # it imports Megatron

    flags = command(script, *arguments, NNODES=str(max(1, ranks // 8))).stdout.splitlines()
    return parse_as_first_rank(flags, ranks, device="cuda")[0]
