"""`scores`: the router's scores in fp32, computed on a GPU's tensor cores.

The product of two bf16 or two fp16 numbers is exact in fp32. So for half-precision operands this
equals the oracle up to the order of the sums, at more than ten times the speed of fp32 on a GPU.

Design notes:
- An fp32 operand (Avg-K's descriptors, gradients of scores) is split in two half-precision terms,
  `a = high + low`, and the product is the sum of the products of terms, without low · low. This
  keeps 16 bits of every number in bf16 and 22 in fp16: a relative error of 2^-17 and 2^-23, while
  one rounding to half precision would leave 2^-9 and 2^-12.
- fp16 has a small range of exponents, so its terms are scaled by powers of two, the low term
  separately.
- Two fp32 operands are multiplied in IEEE fp32, fp64 operands in fp64. A CPU, whose fp32 is fast,
  uses the oracle.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_sffn.ops import device
from megatron_sffn.ops.scores import naive

HALF = (torch.bfloat16, torch.float16)

LOW_TERM = 2.0**11
"""Scale of the low term in fp16, whose numbers are at most 2^-11 times those of the high term."""

SMALLEST = 2.0**-100
"""Lower bound for the largest number of a matrix, so that the scale of its terms is finite."""


def scores(x: Tensor, weight: Tensor) -> Tensor:
    """Scores of all blocks for all tokens.

    Args:
        x: `[T, D]`.
        weight: `[B, D]`.

    Returns:
        `[T, B]` fp32 (fp64 if an operand is), differentiable in both. The host never waits.
    """
    dtype = tensor_core_dtype(x, weight)
    if dtype is None:
        return naive.scores(x, weight)
    result: Tensor = _TensorCoreScores.apply(x, weight, dtype)
    return result


def tensor_core_dtype(x: Tensor, weight: Tensor) -> torch.dtype | None:
    """The half-precision dtype in which the operands are multiplied; None to use the oracle."""
    dtypes = {x.dtype, weight.dtype}
    if not device.is_gpu(x) or torch.float64 in dtypes:
        return None
    return next((dtype for dtype in HALF if dtype in dtypes), None)


class _TensorCoreScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.dtype = dtype
        return product(x, weight.T, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            dx = product(grads[0], weight, ctx.dtype).to(x.dtype)
        if ctx.needs_input_grad[1]:
            dweight = product(grads[0].T, x, ctx.dtype).to(weight.dtype)
        return dx, dweight, None


def product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """`left @ right` in fp32, on tensor cores.

    Args:
        left: `[N, I]` of `dtype` or fp32.
        right: `[I, O]` of `dtype` or fp32.
        dtype: bf16 or fp16, in which numbers are multiplied.

    Returns:
        `[N, O]` fp32.
    """
    total: Tensor | None = None
    for i, (left_term, left_factor) in enumerate(terms(left, dtype)):
        for j, (right_term, right_factor) in enumerate(terms(right, dtype)):
            if i + j > 1:
                continue  # low · low is smaller than the error of the terms
            term = torch.mm(left_term, right_term, out_dtype=torch.float32)
            if dtype is torch.float16:
                term = term * (left_factor * right_factor)
            total = term if total is None else total.add_(term)
    assert total is not None
    return total


def terms(matrix: Tensor, dtype: torch.dtype) -> list[tuple[Tensor, Tensor | float]]:
    """Split a matrix in half-precision terms: the matrix is the sum of term · factor.

    Args:
        matrix: matrix of `dtype`, which gives one term, or of fp32, which gives two.
        dtype: bf16, whose factors are all 1, or fp16.

    Returns:
        (term, factor) of the high and, for fp32, the low term.
    """
    if matrix.dtype == dtype:
        return [(matrix, 1.0)]
    if dtype is torch.bfloat16:
        high = matrix.to(dtype)
        return [(high, 1.0), ((matrix - high).to(dtype), 1.0)]
    largest = matrix.abs().amax().clamp(min=SMALLEST)
    scale = torch.exp2(-torch.ceil(torch.log2(largest)))
    scaled = matrix * scale
    high = scaled.to(dtype)
    return [(high, 1 / scale), (((scaled - high) * LOW_TERM).to(dtype), 1 / (scale * LOW_TERM))]
