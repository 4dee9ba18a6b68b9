"""The oracle of `block_ffn`: a dense layer over all cells, masked before the down projection.

This is check F7 of docs/methods.md: a sparse layer equals the masked dense layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_sffn.ops.activation import AnyActivation
from megatron_sffn.ops.block_ffn.pairs import Pairs


def block_ffn(
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    pairs: Pairs,
    gates: Tensor | None,
    activation: AnyActivation,
) -> Tensor:
    """`y = (f(x Kᵀ) · mask) V`, with the arguments of `op.block_ffn_pairs`; torch differentiates.

    The mask `[R, B]` has the gate of each pair, or 1, and zeros.
    """
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
    """The oracle of `autograd.weighted_values`: one value vector per pair, added to its row."""
    weighted = gates.to(values.dtype)[:, None] * values[pairs.blocks, 0]
    return values.new_zeros(num_rows, values.shape[2]).index_add(0, pairs.rows, weighted)
