"""Room on the disk for checkpoints, before training and before each save.

Enters: Megatron's namespace, or the state that is about to be written. Leaves: bytes needed and
free, and one sentence where the first checkpoint cannot be written.
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
from megatron.training.vocab_utils import calculate_padded_vocab_size

from megatron_sffn.accounting import ModelShape, count_parameters
from megatron_sffn.accounting.table import human
from megatron_sffn.data.tokenize.tokenizer import load_tokenizer
from megatron_sffn.flags.megatron_flags import dtype_of
from megatron_sffn.nn.config import SparseFFNConfig
from megatron_sffn.patches.cpu import is_host
from megatron_sffn.utils.errors import ConfigError

MOMENTS = {"adam": 2, "sgd": 1}
"""Megatron's optimizers -> numbers of their state per parameter."""


def check_saves(args: Namespace, sffn: SparseFFNConfig | None) -> None:
    """Checkpoints can be written: in the way that is asked for, and the disk has room for one.

    Args:
        args: Megatron's validated namespace.
        sffn: the sparse layer; None for the dense baseline.

    Raises:
        ConfigError: if not.
    """
    if args.save is None or args.skip_train:
        return
    if args.async_save and is_host():
        raise ConfigError(
            "--async-save needs a GPU, for the process that writes meanwhile fails without one and "
            "the run would wait for it without end; leave it out"
        )
    if args.ckpt_format != "torch_dist" or args.enable_msc:
        return
    rows = args.padded_vocab_size or calculate_padded_vocab_size(
        load_tokenizer(args).vocab_size,
        args.make_vocab_size_divisible_by,
        args.tensor_model_parallel_size,
        False,
    )
    shape = ModelShape.of_args(Namespace(**{**vars(args), "padded_vocab_size": rows}), sffn)
    needed = bytes_per_parameter(args) * count_parameters(shape).total
    free = free_bytes(Path(args.save))
    if free < needed:
        raise ConfigError(
            f"--save {args.save} has {amount(free)} free, but a checkpoint of this model has "
            f"{amount(needed)}; give a folder with more room"
        )


def bytes_per_parameter(args: Namespace) -> int:
    """Of a checkpoint: the weight, its fp32 copy, the optimizer's numbers."""
    weight = dtype_of(args).itemsize
    half = weight < torch.float32.itemsize
    if args.no_save_optim:
        return weight
    copy = 4 if half or args.use_distributed_optimizer else 0
    return weight + copy + 4 * MOMENTS.get(args.optimizer, 0)


def free_bytes(folder: Path) -> int:
    """Free on the disk of a folder that may not be there yet."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def amount(size: int) -> str:
    """Bytes, as a message says them."""
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
    """What all ranks write, and what the first one sees free, in bytes."""
    free = free_bytes(save) if torch.distributed.get_rank() == 0 else 0
    both = torch.tensor([size, free], dtype=torch.int64, device=torch.cuda.current_device())
    torch.distributed.all_reduce(both)
    needed, room = both.tolist()
    return needed, room
