"""`route_topk` in plain torch: the K-th largest score, then a pass that marks what reaches it.

`torch.topk` alone leaves the order of equal scores open; the mark makes it exact and returns the
ids in order, for a fraction of a stable sort's time.
"""

from __future__ import annotations

import torch
from torch import Tensor


def route_topk(scores: Tensor, num_active: int) -> Tensor:
    """`[T, B]` scores to `[T, K]` ids of the largest; ascending ids, ties to the lowest."""
    tokens, blocks = scores.shape
    if num_active == blocks:
        return torch.arange(blocks, device=scores.device).repeat(tokens, 1)
    least = scores.topk(num_active, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
    chosen = scores >= least
    if int(chosen.sum()) != tokens * num_active:
        # Some row has more scores equal to its threshold than places: the first of them stay.
        above, at = scores > least, scores == least
        places = num_active - above.sum(dim=1, keepdim=True)
        chosen = above | (at & (at.cumsum(dim=1) <= places))
    # A column of its own: a view would keep the other one, too, for as long as the ids live.
    return chosen.nonzero()[:, 1].contiguous().view(tokens, num_active)
