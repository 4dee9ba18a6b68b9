"""The oracle of `scores`: one matmul in fp32, or in fp64 if an operand is fp64."""

from __future__ import annotations

import torch
from torch import Tensor


def scores(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T`, `[T, B]` from `[T, D]` and `[B, D]`; torch differentiates."""
    wide = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    return x.to(wide) @ weight.to(wide).T
