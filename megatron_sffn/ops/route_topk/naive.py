"""The oracle of `route_topk`: a stable sort of every row."""

from __future__ import annotations

from torch import Tensor


def route_topk(scores: Tensor, num_active: int) -> Tensor:
    """The ids `[T, K]` of the largest of `[T, B]` scores; ascending ids, ties to the lowest."""
    order = scores.sort(dim=1, descending=True, stable=True).indices
    return order[:, :num_active].sort(dim=1).values
