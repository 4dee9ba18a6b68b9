"""The machine that a benchmark runs on, and the set-up of this process for Megatron.

Outputs: values for the columns of results, and process groups so that Megatron runs on one rank.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import logging
import os
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sffn.utils.warning_filters import silence

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True)
class Platform:
    """The hardware that ranks run on.

    Args:
        device: its name, for tables.
        backend: the backend of `torch.distributed`.
        devices: number of GPUs, one per rank; None if ranks share a CPU.
    """

    device: str
    backend: str
    devices: int | None

    @property
    def start_method(self) -> str:
        """The start method of ranks: fork inherits the imported Megatron, but CUDA needs spawn."""
        return "spawn" if self.devices else "fork"

    @classmethod
    def here(cls) -> Platform:
        """The platform of this machine."""
        import torch

        from megatron_sffn.patches import cpu

        if cpu.is_host():
            cores = len(os.sched_getaffinity(0))
            return cls(device=f"CPU with {cores} cores", backend="gloo", devices=None)
        return cls(
            device=torch.cuda.get_device_name(), backend="nccl", devices=torch.cuda.device_count()
        )


def adapt() -> None:
    """Prepare this process before it imports Megatron, in the parent and in every rank."""
    silence()
    from megatron_sffn import patches

    patches.prepare()
    for name in ("megatron", "megatron_sffn"):
        logging.getLogger(name).setLevel(logging.WARNING)


@contextlib.contextmanager
def one_rank(platform: Platform) -> Iterator[None]:
    """Megatron's process groups of size one, which its layers ask for."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    with tempfile.TemporaryDirectory() as folder:
        store = torch.distributed.FileStore(f"{folder}/store", 1)
        torch.distributed.init_process_group(platform.backend, store=store, rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1)
        try:
            yield
        finally:
            parallel_state.destroy_model_parallel()
            torch.distributed.destroy_process_group()


def facts(platform: Platform, output: Path | None) -> dict[str, Any]:
    """The first columns of every benchmark: date, commit, device, torch, megatron_core."""
    import torch

    device = platform.device
    if platform.devices is None:
        device += f", {torch.backends.cpu.get_cpu_capability()}"
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(output),
        "device": device,
        "torch": torch.__version__,
        "megatron_core": version_of("megatron-core"),
    }


def version_of(package: str) -> str:
    """The version of an installed package; empty if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _commit(output: Path | None) -> str:
    """The short commit hash, with `-dirty` if tracked files other than the results have changed."""

    def git(*words: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("diff", "--name-only", "HEAD").splitlines()
        name = git("rev-parse", "--short", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        return ""
    changed_sources = [
        path for path in changed if output is None or ROOT / path != output.resolve()
    ]
    return f"{name}-dirty" if changed_sources else name
