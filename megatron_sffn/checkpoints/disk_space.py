"""Disk space of checkpoints: bytes that a save needs, and bytes that are free.

Inputs: Megatron's namespace (before training, `checks/disk.py`), or the state that is about to be
written (before each save).
"""

from __future__ import annotations

import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedTensor,
    ShardedTensorFactory,
    is_main_replica,
)

from megatron_sffn.accounting.table import human
from megatron_sffn.flags.megatron_flags import dtype_of

MOMENTS = {"adam": 2, "sgd": 1, "lion": 1, "muon": 1, "dist_muon": 1}
"""Megatron's optimizer -> moments that it keeps per parameter at least."""


def bytes_per_parameter(args: Namespace) -> int:
    """Bytes of a checkpoint per parameter: the weight, its fp32 copy, the optimizer's moments."""
    weight = dtype_of(args).itemsize
    half = weight < torch.float32.itemsize
    if args.no_save_optim:
        return weight
    copy = 4 if half or args.use_distributed_optimizer else 0
    return weight + copy + 4 * MOMENTS.get(args.optimizer, 0)


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of a folder, which need not exist yet."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def amount(size: int) -> str:
    """Bytes as messages print them, with a unit."""
    return f"{human(size)}B"


def written_bytes(state: Any) -> int:
    """Bytes of the tensors that this rank writes.

    Args:
        state: Megatron's sharded state.
    """
    return sum(
        entry.data.nbytes
        for entry in nested_values(state)
        if isinstance(entry, ShardedTensor | ShardedTensorFactory)
        and entry.data is not None
        and is_main_replica(entry.replica_id)
    )


def on_all_ranks(size: int, save: Path) -> tuple[int, int]:
    """Bytes that all ranks write together, and bytes that are free as the first rank sees it."""
    free = free_bytes(save) if torch.distributed.get_rank() == 0 else 0
    sums = torch.tensor([size, free], dtype=torch.int64, device=torch.cuda.current_device())
    torch.distributed.all_reduce(sums)
    needed, free = sums.tolist()
    return needed, free
