"""The oracle of `scores`: one product of operands that are fp32 at least."""

from __future__ import annotations

import torch
from torch import Tensor


def scores(x: Tensor, weight: Tensor) -> Tensor:
    """`[T, D]` and `[B, D]` to `[T, B]`, in fp32, or in fp64 if an operand is; differentiable."""
    wide = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    return x.to(wide) @ weight.to(wide).T
