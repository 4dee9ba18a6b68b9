"""`route_topk` in plain torch, for any device; the host never waits for the device.

`torch.topk` finds the K largest scores of a row, but does not say which of several equal scores it
returns. So the ids of scores that equal the K-th largest are replaced: the j-th of them becomes the
j-th lowest id with this score. A row with NaN keeps the ids of `torch.topk`, which are distinct and
in range.

Design notes: the j-th lowest id is found by a binary search for j in the running count of equal
scores. Turning a mask into ids by `nonzero` would make the host wait for the number of ids.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCRATCH_NUMBERS = 1 << 26
"""Most scores in a slice of rows; each takes 4 bytes for its running count."""


def route_topk(scores: Tensor, num_active: int) -> Tensor:
    """The ids `[T, K]` of the largest of `[T, B]` scores; ascending ids, ties to the lowest."""
    tokens, blocks = scores.shape
    if num_active == blocks:
        return torch.arange(blocks, device=scores.device).repeat(tokens, 1)
    slices = scores.split(max(1, SCRATCH_NUMBERS // blocks))
    return torch.cat([_select(rows, num_active) for rows in slices])


def _select(scores_TB: Tensor, num_active: int) -> Tensor:
    """`route_topk` for a slice of rows."""
    values_TK, ids_TK = scores_TB.topk(num_active, dim=1, sorted=False)
    least_T1 = values_TK.amin(dim=1, keepdim=True)
    # A NaN among the values makes `least_T1` NaN, which equals nothing, so that no id is replaced.
    is_tie_TK = values_TK == least_T1
    ties_so_far_TB = (scores_TB == least_T1).cumsum(dim=1, dtype=torch.int32)
    # The K values have ties number 1, 2, 3, ...; find the lowest ids with these numbers.
    lowest_ids_TK = torch.searchsorted(ties_so_far_TB, is_tie_TK.cumsum(dim=1, dtype=torch.int32))
    return torch.where(is_tie_TK, lowest_ids_TK, ids_TK).sort(dim=1).values
