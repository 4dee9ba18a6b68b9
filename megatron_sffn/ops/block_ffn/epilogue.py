"""What happens to the numbers of the pairs between two products: activation, gates, derivatives.

Inputs: up projections `[P, N]`, N = G or 2G (gate half first), and gates `[P]` in fp32. Outputs:
coefficients `[P, G]` and gradients, in the dtype of the up projections.

Design notes:
- Where there are gates, the arithmetic is in fp32 (fp64 for fp64), and a result is rounded once.
  Gates, and the gradients of gates, are never rounded: a router learns from small differences.
- Wide numbers exist for one piece of the pairs at a time, so that they need no memory to speak of.
- A backend that has `up_activated` or `down_backward_activated` does all this where its products
  are still in registers; this is for those that have not.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_sffn.ops.activation import Activation

PIECE = 1 << 24
"""Numbers of a piece: 64 MB in fp32."""


def activated(ups: Tensor, gates: Tensor | None, activation: Activation) -> Tensor:
    """`f(ups) · gates`.

    Args:
        ups: `[P, N]`.
        gates: `[P]` fp32 (fp64 for fp64) or None for 1.
        activation: f.

    Returns:
        `[P, G]` of the dtype of ups.
    """
    if gates is None:
        return activation(ups)
    h = ups.new_empty(len(ups), ups.shape[1] // activation.keys_per_cell)
    for piece in _pieces(ups):
        torch.mul(activation(ups[piece].to(gates.dtype)), gates[piece, None], out=h[piece])
    return h


def backward(
    ups: Tensor, dh: Tensor, gates: Tensor | None, activation: Activation
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`activated`, and its gradients.

    Args:
        ups: `[P, N]`.
        dh: `[P, G]`, gradient of the result of `activated`, of the dtype of ups.
        gates: `[P]` as in `activated`.
        activation: f.

    Returns:
        The result of `activated`; the gradient `[P, N]` of ups, in their dtype; that of the gates,
        `[P]` in theirs, or None.
    """
    if gates is None:
        return activation(ups), activation.backward(dh, ups), None
    h, dups, dgates = torch.empty_like(dh), torch.empty_like(ups), torch.empty_like(gates)
    for piece in _pieces(ups):
        wide_ups, wide_dh = ups[piece].to(gates.dtype), dh[piece].to(gates.dtype)
        ungated = activation(wide_ups)
        torch.sum(ungated * wide_dh, dim=1, out=dgates[piece])
        torch.mul(ungated, gates[piece, None], out=h[piece])
        dups[piece] = activation.backward(wide_dh * gates[piece, None], wide_ups)
    return h, dups, dgates


def _pieces(ups: Tensor) -> Iterator[slice]:
    """Slices of pairs that have at most `PIECE` numbers together."""
    count = max(1, PIECE // ups.shape[1])
    return (slice(first, first + count) for first in range(0, len(ups), count))
