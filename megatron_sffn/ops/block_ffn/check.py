"""What `block_ffn` refuses: each rule one sentence, before anything is computed.

Shapes, dtypes and devices are always checked, which costs nothing. Whether each pair names a row
and a block that exist is a question to the device; it is asked where `SFFN_CHECK=1` is set.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from megatron_sffn.ops.activation import Activation
from megatron_sffn.ops.block_ffn.pairs import Pairs
from megatron_sffn.utils.errors import ConfigError


def activation(name: str) -> Activation:
    """The activation of a name; raises `ConfigError` if there is none."""
    try:
        return Activation(name)
    except ValueError:
        raise ConfigError(
            f"activation {name!r} does not exist; use one of {', '.join(Activation)}"
        ) from None


def ids(x: Tensor, block_ids: Tensor, gates: Tensor | None) -> None:
    """Raise `ConfigError` unless there is a row of ids, and of gates, for each token."""
    if block_ids.dim() != 2 or len(block_ids) != len(x) or block_ids.is_floating_point():
        raise ConfigError(
            f"block_ids {tuple(block_ids.shape)} {block_ids.dtype} do not fit x {tuple(x.shape)}; "
            f"give [T, K] integers with T = {len(x)}"
        )
    if gates is not None and gates.shape != block_ids.shape:
        raise ConfigError(
            f"gates {tuple(gates.shape)} do not fit block_ids {tuple(block_ids.shape)}; "
            "give one for each id"
        )


def tensors(
    x: Tensor,
    keys: Tensor | None,
    values: Tensor,
    pairs: Pairs,
    gates: Tensor | None,
    activation: Activation,
) -> None:
    """Raise `ConfigError` unless shapes, dtypes and devices fit; arguments as `block_ffn_pairs`."""
    if x.dim() != 2 or values.dim() != 3:
        raise ConfigError(
            f"x {tuple(x.shape)} and values {tuple(values.shape)} must be [T, C] and [B, G, D]; "
            "reshape them"
        )
    blocks, cells, _ = values.shape
    if keys is None:
        if gates is None or cells != 1:
            raise ConfigError(
                f"values {tuple(values.shape)} without keys need blocks of one cell, and gates as "
                "their coefficients; give keys, or both"
            )
    elif keys.shape != (expected := (blocks, cells * (2 if activation.gated else 1), x.shape[1])):
        raise ConfigError(
            f"x {tuple(x.shape)}, keys {tuple(keys.shape)} and values {tuple(values.shape)} do not "
            f"fit activation {activation}; keys must be {expected}"
        )
    if gates is not None and gates.shape != pairs.rows.shape:
        raise ConfigError(
            f"gates {tuple(gates.shape)} do not fit {len(pairs.rows)} pairs of rows and blocks; "
            "give one for each"
        )
    tables = {"values": values} | ({} if keys is None else {"x": x, "keys": keys})
    if not values.is_floating_point() or len({table.dtype for table in tables.values()}) > 1:
        raise ConfigError(
            f"{', '.join(f'{name} is {table.dtype}' for name, table in tables.items())}; "
            "give them one dtype: float64, float32, bfloat16 or float16"
        )
    places = tables | {"pairs": pairs.blocks} | ({} if gates is None else {"gates": gates})
    if len({tensor.device for tensor in places.values()}) > 1:
        raise ConfigError(
            f"{', '.join(f'{name} is on {tensor.device}' for name, tensor in places.items())}; "
            "move them to one device"
        )


def pairs(pairs: Pairs, num_rows: int, num_blocks: int, *, distinct: bool) -> None:
    """Raise `ConfigError` for a pair without its row or block, or out of order; waits for a GPU.

    Does nothing unless the environment has `SFFN_CHECK=1`.

    Args:
        pairs: of any backend.
        num_rows: R.
        num_blocks: B.
        distinct: whether a row can meet a block only once.
    """
    if os.environ.get("SFFN_CHECK") != "1" or not len(pairs.rows):
        return
    for name, index, size in (
        ("row", pairs.rows, num_rows),
        ("block id", pairs.blocks, num_blocks),
    ):
        wrong = (index < 0) | (index >= size)
        if wrong.any():
            raise ConfigError(
                f"{name} {int(index[wrong][0])} is not in [0, {size}), as {int(wrong.sum())} of "
                f"{len(index)} are not; correct what chose them"
            )
    if (pairs.rows.diff() < 0).any():
        raise ConfigError("rows of pairs must ascend, and do not; sort the pairs by row")
    meetings = pairs.rows.long() * num_blocks + pairs.blocks
    unique, counts = torch.unique(meetings, return_counts=True)
    if distinct and len(unique) < len(meetings):
        twice = int(unique[counts > 1][0])
        raise ConfigError(
            f"block id {twice % num_blocks} appears twice in row {twice // num_blocks}; "
            "give each row distinct ids"
        )
