"""Operators that torch only has for CUDA, registered for the CPU, for simulated GPUs."""

from __future__ import annotations

import torch
from torch import Tensor


def wide_product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """`torch.mm(left, right, out_dtype=dtype)`: sums in another dtype than the operands'."""
    return left.to(dtype) @ right.to(dtype)


CUDA_OPERATORS = torch.library.Library("aten", "IMPL")
"""Holds the registration; torch drops it with this object."""

CUDA_OPERATORS.impl("mm.dtype", wide_product, "CPU")
