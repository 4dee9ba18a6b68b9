"""A memory of values alone: `y_r = Σ gate · v` over the pairs of row r; its coefficients are given.

The op is torch's `embedding_bag`, which never holds one vector per pair.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_sffn.ops.block_ffn.pairs import Pairs


def weighted_values(num_rows: int, values: Tensor, pairs: Pairs, gates: Tensor) -> Tensor:
    """Sum the values of each row.

    Args:
        num_rows: R.
        values: `[B, D]`, of blocks of one cell.
        pairs: which row meets which block, rows ascending.
        gates: `[P]`.

    Returns:
        `[R, D]` of the values' dtype, differentiable in values and gates.
    """
    rows = torch.arange(num_rows, device=values.device)
    offsets = torch.searchsorted(pairs.rows, rows)
    return F.embedding_bag(
        pairs.blocks, values, offsets, mode="sum", per_sample_weights=gates.to(values.dtype)
    )


def naive(num_rows: int, values: Tensor, pairs: Pairs, gates: Tensor) -> Tensor:
    """The oracle: one vector per pair."""
    weighted = gates.to(values.dtype)[:, None] * values[pairs.blocks]
    return values.new_zeros(num_rows, values.shape[1]).index_add(0, pairs.rows, weighted)
