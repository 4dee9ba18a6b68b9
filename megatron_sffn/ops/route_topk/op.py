"""`route_topk`: the K best of B blocks per token."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_sffn.ops.route_topk import cpu, naive

IMPLEMENTATIONS = {"naive": naive.route_topk, "cpu": cpu.route_topk}


@torch.no_grad()
def route_topk(scores: Tensor, num_active: int, *, backend: str = "cpu") -> Tensor:
    """Choose the blocks with the largest scores.

    Args:
        scores: `[T, B]` real; not NaN; -inf comes last.
        num_active: K, from 1 to B.
        backend: `cpu` (threshold select, also on a GPU) or `naive` (stable sort, the oracle).

    Returns:
        `[T, K]` int64, ascending within a row; of equal scores the lowest index wins, so that
        every rank and every layout chooses alike.

    Raises:
        FloatingPointError: if a score is NaN.
    """
    # NaN would be the largest of its row.
    if scores.shape[0] and scores.amax(dim=1).isnan().any():
        raise FloatingPointError(
            f"{int(scores.isnan().sum())} of {scores.numel()} block scores are NaN; "
            "the hidden states or keys that they come from have diverged"
        )
    return IMPLEMENTATIONS[backend](scores, num_active)
