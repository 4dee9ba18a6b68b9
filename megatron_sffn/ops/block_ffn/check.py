"""Checks of the arguments of `block_ffn`, before anything is computed.

Shapes, dtypes and devices are always checked, which costs nothing. Whether every pair has a row and
a block that exist is only checked with `SFFN_CHECK=1`, because the host has to wait for the device.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from megatron_sffn.ops.activation import Activation, AnyActivation, ClampedActivation
from megatron_sffn.ops.block_ffn.pairs import Pairs
from megatron_sffn.utils.errors import ConfigError


def activation(name: AnyActivation | str) -> AnyActivation:
    """The activation with this name; raises `ConfigError` if it does not exist."""
    if isinstance(name, ClampedActivation):
        return name
    try:
        return Activation(name)
    except ValueError:
        raise ConfigError(
            f"activation {name!r} does not exist; use one of {', '.join(Activation)}"
        ) from None


def ids(x: Tensor, block_ids: Tensor, gates: Tensor | None) -> None:
    """Raise `ConfigError` unless ids and gates have one row per token."""
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
    activation: AnyActivation,
) -> None:
    """Raise `ConfigError` unless the shapes, dtypes and devices of `block_ffn_pairs` fit."""
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
    arguments = tables | {"pairs": pairs.blocks} | ({} if gates is None else {"gates": gates})
    if len({tensor.device for tensor in arguments.values()}) > 1:
        raise ConfigError(
            f"{', '.join(f'{name} is on {tensor.device}' for name, tensor in arguments.items())}; "
            "move them to one device"
        )


def pairs(pairs: Pairs, num_rows: int, num_blocks: int, *, distinct: bool) -> None:
    """With `SFFN_CHECK=1`, raise `ConfigError` if an index is out of range or out of order.

    Without it, do nothing. The host waits for the device.

    Args:
        pairs: the pairs to check.
        num_rows: R.
        num_blocks: B.
        distinct: True if a row must not have a block twice.
    """
    if os.environ.get("SFFN_CHECK") != "1" or not len(pairs.rows):
        return
    for name, index, size in (
        ("row", pairs.rows, num_rows),
        ("block id", pairs.blocks, num_blocks),
    ):
        bad = (index < 0) | (index >= size)
        if bad.any():
            raise ConfigError(
                f"{name} {int(index[bad][0])} is not in [0, {size}), as {int(bad.sum())} of "
                f"{len(index)} are not; correct what chose them"
            )
    if (pairs.rows.diff() < 0).any():
        raise ConfigError("rows of pairs must ascend, and do not; sort the pairs by row")
    pair_ids = pairs.rows.long() * num_blocks + pairs.blocks
    unique, counts = torch.unique(pair_ids, return_counts=True)
    if distinct and len(unique) < len(pair_ids):
        duplicate = int(unique[counts > 1][0])
        raise ConfigError(
            f"block id {duplicate % num_blocks} appears twice in row {duplicate // num_blocks}; "
            "give each row distinct ids"
        )
