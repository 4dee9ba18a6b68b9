"""How often each block is chosen: without a wait for the device, and exactly.

`torch.bincount` makes the host read the largest id; a mask makes it read how many ids remain.
"""

from __future__ import annotations

import torch
from torch import Tensor


def count_ids(ids: Tensor, num_ids: int) -> Tensor:
    """Count small integers; sums of integers do not depend on the order of atomic additions.

    Args:
        ids: integers in [-1, num_ids), of any shape.
        num_ids: N.

    Returns:
        `[N + 1]` int64: how often -1 appears, then 0, 1, and so on.
    """
    flat = ids.reshape(-1).long() + 1
    counts = torch.zeros(num_ids + 1, dtype=torch.int64, device=ids.device)
    return counts.scatter_add_(0, flat, torch.ones_like(flat))
