"""`route_topk` in plain torch, for any device: it never waits for the device.

`torch.topk` finds the K-th largest score of a row, and leaves open which of several equal scores it
returns. Only those places are filled again: the j-th of them gets the j-th block, in order, whose
score equals the K-th largest. A row with NaN keeps the ids of `torch.topk`, which are distinct and
in range.

Design notes: the running count of equal scores is searched for 1, 2, 3, ..., because a mask turned
into ids by `nonzero` would make the host wait for the number of ids.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCRATCH_NUMBERS = 1 << 26
"""Scores of a chunk of rows: its running counts take 4 bytes each."""


def route_topk(scores: Tensor, num_active: int) -> Tensor:
    """`[T, B]` scores to `[T, K]` ids of the largest; ascending ids, ties to the lowest."""
    tokens, blocks = scores.shape
    if num_active == blocks:
        return torch.arange(blocks, device=scores.device).repeat(tokens, 1)
    chunks = scores.split(max(1, SCRATCH_NUMBERS // blocks))
    return torch.cat([_select(chunk, num_active) for chunk in chunks])


def _select(scores: Tensor, num_active: int) -> Tensor:
    """`route_topk` of a few rows."""
    values, ids = scores.topk(num_active, dim=1, sorted=False)
    least = values.amin(dim=1, keepdim=True)
    # A NaN among the values makes `least` NaN, which equals nothing: the ids stay as they are.
    tied = values == least
    equal_so_far = (scores == least).cumsum(dim=1, dtype=torch.int32)
    lowest = torch.searchsorted(equal_so_far, tied.cumsum(dim=1, dtype=torch.int32))
    return torch.where(tied, lowest, ids).sort(dim=1).values
