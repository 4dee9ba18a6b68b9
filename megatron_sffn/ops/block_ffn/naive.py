"""The oracle of `block_ffn`: all cells for all rows, then the mask (methods F7)."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_sffn.ops.activation import Activation
from megatron_sffn.ops.block_ffn.pairs import Pairs


def block_ffn(
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    pairs: Pairs,
    gates: Tensor | None,
    activation: Activation,
) -> Tensor:
    """`y = (f(x Kᵀ) · mask) V`; arguments as `op.block_ffn_pairs`, differentiable by autograd."""
    rows, blocks = x.shape[0], keys.shape[0]
    wide = torch.promote_types(x.dtype, torch.float32)
    ones = x.new_ones(len(pairs.rows), dtype=wide)
    factors = ones if gates is None else gates.to(wide)
    mask = ones.new_zeros(rows, blocks)
    mask = mask.index_put((pairs.rows, pairs.blocks), factors, accumulate=True)
    up = torch.einsum("rd,bgd->rbg", x, keys)
    h = (activation(up) * mask[:, :, None]).to(x.dtype)
    return torch.einsum("rbg,bgd->rd", h, values)


def weighted_values(num_rows: int, values: Tensor, pairs: Pairs, gates: Tensor) -> Tensor:
    """The oracle of `autograd.weighted_values`: one vector per pair."""
    weighted = gates.to(values.dtype)[:, None] * values[pairs.blocks, 0]
    return values.new_zeros(num_rows, values.shape[2]).index_add(0, pairs.rows, weighted)
