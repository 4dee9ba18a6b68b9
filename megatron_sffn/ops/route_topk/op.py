"""`route_topk`: the K best of B blocks per token."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_sffn.ops.compiled import kernels
from megatron_sffn.ops.route_topk import naive, threshold

BACKENDS = ("auto", "naive", "torch")


@torch.no_grad()
def route_topk(scores: Tensor, num_active: int, *, backend: str = "auto") -> Tensor:
    """Choose the blocks with the largest scores.

    Args:
        scores: `[T, B]` real; not NaN; -inf comes last.
        num_active: K, from 1 to B.
        backend: `naive`, the oracle, a stable sort; `torch`, on any device; or `auto`: C++ on a
            CPU that has it, else `torch`.

    Returns:
        `[T, K]` int64, ascending within a row; of equal scores the lowest index wins, so that
        every rank and every layout chooses alike.

    Raises:
        FloatingPointError: if a score is NaN.
    """
    compiled = kernels() if backend == "auto" and not scores.is_cuda else None
    if compiled is not None:
        wide = torch.promote_types(scores.dtype, torch.float32)
        ids, numbers = compiled.route_topk(scores.to(wide).contiguous(), num_active)
        if numbers:
            return ids
    # NaN would be the largest of its row.
    if scores.shape[0] and scores.amax(dim=1).isnan().any():
        raise FloatingPointError(
            f"{int(scores.isnan().sum())} of {scores.numel()} block scores are NaN; "
            "the hidden states or keys that they come from have diverged"
        )
    select = naive.route_topk if backend == "naive" else threshold.route_topk
    return select(scores, num_active)
