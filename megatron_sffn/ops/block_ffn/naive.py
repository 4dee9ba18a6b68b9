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
    factors = x.new_ones(len(pairs.rows)) if gates is None else gates.to(x.dtype)
    mask = x.new_zeros(rows, blocks).index_put((pairs.rows, pairs.blocks), factors, accumulate=True)
    up = torch.einsum("rd,bgd->rbg", x, keys)
    return torch.einsum("rbg,bgd->rd", activation(up) * mask[:, :, None], values)


def weighted_values(num_rows: int, values: Tensor, pairs: Pairs, gates: Tensor) -> Tensor:
    """The oracle of `function.weighted_values`: one vector per pair."""
    weighted = gates.to(values.dtype)[:, None] * values[pairs.blocks, 0]
    return values.new_zeros(num_rows, values.shape[2]).index_add(0, pairs.rows, weighted)
