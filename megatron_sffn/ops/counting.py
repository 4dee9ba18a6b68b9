"""Count how often each id occurs, exactly and without a wait for the device.

Design notes: `torch.bincount` makes the host wait for the largest id, and a boolean mask makes it
wait for the number of ids that remain. A scatter-add into a table of fixed size does neither.
"""

from __future__ import annotations

import torch
from torch import Tensor


def count_ids(ids: Tensor, num_ids: int) -> Tensor:
    """Count small integers. Integer sums do not depend on the order of atomic additions.

    Args:
        ids: integers in [-1, num_ids), of any shape.
        num_ids: number of ids that are not -1.

    Returns:
        `[num_ids + 1]` int64: the counts of -1, 0, 1 and so on.
    """
    flat = ids.reshape(-1).long() + 1
    counts = torch.zeros(num_ids + 1, dtype=torch.int64, device=ids.device)
    return counts.scatter_add_(0, flat, torch.ones_like(flat))
