"""The oracle of `route_topk`: a stable sort of every row."""

from __future__ import annotations

from torch import Tensor


def route_topk(scores: Tensor, num_active: int) -> Tensor:
    """`[T, B]` scores to `[T, K]` ids of the largest; ascending ids, ties to the lowest."""
    order = scores.sort(dim=1, descending=True, stable=True).indices
    return order[:, :num_active].sort(dim=1).values
