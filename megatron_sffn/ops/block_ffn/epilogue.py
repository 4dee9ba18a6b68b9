"""Elementwise work between the two products of a layer: activation, gates and their gradients.

Inputs: up projections `[P, N]`, N = G or 2G (gate half first), and gates `[P]` in fp32. Outputs:
coefficients `[P, G]` and gradients, in the dtype of the up projections.

Design notes:
- With gates the arithmetic is in fp32 (fp64 for fp64), and a result is rounded once. Gates and
  their gradients are never rounded, because a router learns from small differences.
- fp32 copies exist for one slice of the pairs at a time, which bounds their memory.
- A backend with the fused forms `up_activated` and `down_backward_activated` does this work in its
  kernels instead, while the products are in registers.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_sffn.ops.activation import AnyActivation

PIECE = 1 << 24
"""Most numbers in a slice of pairs: 64 MB in fp32."""


def activated(ups: Tensor, gates: Tensor | None, activation: AnyActivation) -> Tensor:
    """`f(ups) · gates`.

    Args:
        ups: `[P, N]`.
        gates: `[P]` fp32 (fp64 for fp64) or None for 1.
        activation: f.

    Returns:
        The coefficients h, `[P, G]` of the dtype of ups.
    """
    if gates is None:
        return activation(ups)
    h = ups.new_empty(len(ups), ups.shape[1] // activation.keys_per_cell)
    for piece in _pieces(ups):
        torch.mul(activation(ups[piece].to(gates.dtype)), gates[piece, None], out=h[piece])
    return h


def backward(
    ups: Tensor, dh: Tensor, gates: Tensor | None, activation: AnyActivation
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`activated` again, and the gradients of its inputs.

    Args:
        ups: `[P, N]`.
        dh: `[P, G]`, the gradient of h, of the dtype of ups.
        gates: `[P]` as in `activated`.
        activation: f.

    Returns:
        h, as `activated` returned it; the gradient of ups, `[P, N]` in their dtype; the gradient of
        the gates, `[P]` in their dtype, or None.
    """
    if gates is None:
        return activation(ups), activation.backward(dh, ups), None
    h, dups, dgates = torch.empty_like(dh), torch.empty_like(ups), torch.empty_like(gates)
    for piece in _pieces(ups):
        ups_fp32, dh_fp32 = ups[piece].to(gates.dtype), dh[piece].to(gates.dtype)
        ungated_h = activation(ups_fp32)
        torch.sum(ungated_h * dh_fp32, dim=1, out=dgates[piece])
        torch.mul(ungated_h, gates[piece, None], out=h[piece])
        dups[piece] = activation.backward(dh_fp32 * gates[piece, None], ups_fp32)
    return h, dups, dgates


def _pieces(ups: Tensor) -> Iterator[slice]:
    """Slices of pairs with at most `PIECE` numbers each."""
    count = max(1, PIECE // ups.shape[1])
    return (slice(first, first + count) for first in range(0, len(ups), count))
