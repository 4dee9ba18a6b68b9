"""Device functions on a tile of sums in registers: the activations, and the store.

Inputs: tiles in fp32. Outputs: coefficients and gradients in fp32, as `ops/activation.py` defines
them. The name of the activation is a compile-time constant: a kernel contains one activation.
"""

from __future__ import annotations

import triton
import triton.language as tl

PIECE = tl.constexpr(16)
"""Columns that an epilogue works on at a time. For a whole tile the addresses, the inputs and the
results would not fit in the registers beside the accumulators."""


@triton.jit
def normal_cdf(x: tl.tensor) -> tl.tensor:
    """The cumulative distribution function of the standard normal distribution, by erf."""
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def positive(x: tl.tensor) -> tl.tensor:
    """`max(x, 0)` that keeps NaN: `x <= 0` is false for NaN, while `tl.maximum` would drop it."""
    return tl.where(x <= 0, 0.0, x)


@triton.jit
def activate(up: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    """`f(up)` of an activation that has one key per cell."""
    if ACTIVATION == "gelu":
        return up * normal_cdf(up)
    elif ACTIVATION == "relu":
        return positive(up)
    else:
        tl.static_assert(ACTIVATION == "squared_relu")
        return positive(up) * positive(up)


@triton.jit
def activate_backward(grad: tl.tensor, up: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    """`f'(up) · grad` of an activation that has one key per cell."""
    if ACTIVATION == "gelu":
        # The derivative of u · Φ(u) is Φ(u) + u · φ(u), with φ(0) = 1 / √(2π) = 0.3989...
        density = 0.3989422804014327 * tl.exp(-0.5 * up * up)
        return grad * (normal_cdf(up) + up * density)
    elif ACTIVATION == "relu":
        return tl.where(up <= 0, 0.0, grad)
    else:
        tl.static_assert(ACTIVATION == "squared_relu")
        return grad * (2.0 * positive(up))


@triton.jit
def steepened(gate: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    """The argument of σ in a gated activation."""
    if ACTIVATION == "swiglu":
        return gate
    else:
        tl.static_assert(ACTIVATION == "quick_geglu")
        return 1.702 * gate


@triton.jit
def activate_gated(gate: tl.tensor, linear: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    """`gate · σ(a gate) · linear`, with a = 1 for SwiGLU."""
    return gate * tl.sigmoid(steepened(gate, ACTIVATION)) * linear


@triton.jit
def activate_gated_backward(
    grad: tl.tensor, gate: tl.tensor, linear: tl.tensor, ACTIVATION: tl.constexpr
) -> tl.tensor:
    """The gradients of `activate_gated` in gate and linear."""
    # The derivative of g · σ(a g) is σ(a g) · (1 + a g · (1 - σ(a g))).
    steep = steepened(gate, ACTIVATION)
    sigmoid = tl.sigmoid(steep)
    return grad * linear * (sigmoid * (1.0 + steep * (1.0 - sigmoid))), grad * (gate * sigmoid)


@triton.jit
def halves(tile: tl.tensor) -> tl.tensor:
    """The left and the right half of the columns of a tile."""
    # `tl.split` needs a last axis of size 2.
    both_halves = tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2))
    return tl.split(tl.permute(both_halves, (0, 2, 1)))


@triton.jit
def store_tile(
    tile: tl.tensor,
    p_rows: tl.tensor,
    m_rows: tl.tensor,
    first: tl.tensor,
    width: tl.tensor,
    ADD: tl.constexpr,
) -> None:
    """Store a tile `[H, W]`, PIECE columns at a time, or add it to the numbers in memory.

    Args:
        tile: fp32.
        p_rows: `[H]`, pointers to the beginning of each row.
        m_rows: `[H]`, False for a row that does not exist.
        first: the first column of the tile.
        width: columns per row.
        ADD: True to add.
    """
    COLUMNS: tl.constexpr = tile.shape[1]
    if COLUMNS > PIECE:
        left, right = halves(tile)
        store_tile(left, p_rows, m_rows, first, width, ADD)
        store_tile(right, p_rows, m_rows, first + COLUMNS // 2, width, ADD)
    else:
        o_w = first + tl.arange(0, COLUMNS)
        p_tile = p_rows[:, None] + o_w[None, :]
        m_tile = m_rows[:, None] & (o_w < width)[None, :]
        if ADD:
            tile += tl.load(p_tile, mask=m_tile, other=0.0)
        tl.store(p_tile, tile.to(p_rows.dtype.element_ty), mask=m_tile)
