"""Two grouped GEMMs with a fused epilogue: activation, gates and their gradients in registers.

Inputs: those of `triton_grouped.to_pairs`, with fp32 gates `[P]` or None and the activation.
Outputs: those of the fused forms of `Products`. Results are bitwise reproducible.

Design notes:
- The arithmetic is that of `epilogue.py`: fp32, with one rounding per result. Up projections are
  rounded before they are activated, because the backward pass has only the rounded ones. The
  gradient of the coefficients is never rounded, since it stays in registers.
- The saving is derived, not measured: of the 9 passes of the plain epilogue over P·G numbers (4 in
  the forward pass) there remain the writes of the results and one read of the up projections.
- A gated activation has two keys per cell. A program owns the gate keys and the linear keys of the
  same cells, and reads its rows once for both.
- The gradient of a gate is a sum over the cells of a block. A program sums over its tile; if a
  block has several tiles, their sums go to scratch and are added in the order of the tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_sffn.ops.activation import Activation
from megatron_sffn.ops.block_ffn.pairs import Sorted
from megatron_sffn.ops.block_ffn.triton_epilogue import (
    PIECE,
    activate,
    activate_backward,
    activate_gated,
    activate_gated_backward,
    halves,
)
from megatron_sffn.ops.block_ffn.triton_grouped import schedule_of, tiles_of
from megatron_sffn.ops.block_ffn.triton_tiles import launch, side


def up_activated(
    x: Tensor, keys: Tensor, pairs: Sorted, gates: Tensor | None, activation: Activation
) -> tuple[Tensor, Tensor]:
    """The up projections of the pairs, and the coefficients of their values.

    Args:
        x: `[R, D]`.
        keys: `[B, N, D]`; N is G, or 2G with the gate keys first.
        pairs: sorted by block.
        gates: fp32 `[P]`, or None for 1.
        activation: f.

    Returns:
        `x Kᵀ` of each pair, `[P, N]`, and `f(ups) · gates`, `[P, G]`, both in the dtype of x.
    """
    num_pairs, (_, num_keys, width) = len(pairs.rows), keys.shape
    cells = num_keys // activation.keys_per_cell
    ups, h = x.new_empty(num_pairs, num_keys), x.new_empty(num_pairs, cells)
    if not num_pairs:
        return ups, h
    tiles = tiles_of(keys, "to_pairs", num_keys)
    schedule = schedule_of(pairs, tiles.height)
    # A gated program has one accumulator per key of a cell, so half as many cells fit.
    block_g = side(cells, tiles.columns // activation.keys_per_cell)
    launch(
        up_kernel,
        len(schedule.blocks) * triton.cdiv(cells, block_g),
        tiles,
        writes=("ups", "h"),
        x=x,
        keys=keys,
        ups=ups,
        h=h,
        gates=gates,
        rows=pairs.rows,
        offsets=pairs.offsets,
        blocks=schedule.blocks,
        firsts=schedule.firsts,
        D=width,
        G=cells,
        ACTIVATION=activation.value,
        BLOCK_P=tiles.height,
        BLOCK_D=side(width, tiles.inner),
        BLOCK_G=block_g,
    )
    return ups, h


def down_backward_activated(
    dy: Tensor,
    values: Tensor,
    pairs: Sorted,
    ups: Tensor,
    gates: Tensor | None,
    activation: Activation,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of ups and gates, through the gradient `dy Vᵀ` of the coefficients.

    Args:
        dy: `[R, D]`.
        values: `[B, G, D]`.
        pairs: sorted by block.
        ups: `[P, N]`, as `up_activated` returned them.
        gates: fp32 `[P]`, or None for 1.
        activation: f.

    Returns:
        The coefficients `[P, G]` again; the gradient of ups, `[P, N]`; the gradient of the gates,
        fp32 `[P]`, or None.
    """
    num_pairs, (_, cells, width) = len(pairs.rows), values.shape
    h, dups = ups.new_empty(num_pairs, cells), torch.empty_like(ups)
    if not num_pairs:
        return h, dups, None if gates is None else torch.empty_like(gates)
    tiles = tiles_of(values, "to_pairs, backward", cells)
    schedule = schedule_of(pairs, tiles.height)
    block_g = side(cells, tiles.columns)
    num_tiles = triton.cdiv(cells, block_g)
    sums = None if gates is None else gates.new_empty(num_tiles, num_pairs)
    launch(
        down_backward_kernel,
        len(schedule.blocks) * num_tiles,
        tiles,
        writes=("h", "dups", "sums"),
        dy=dy,
        values=values,
        ups=ups,
        h=h,
        dups=dups,
        gates=gates,
        sums=sums,
        rows=pairs.rows,
        offsets=pairs.offsets,
        blocks=schedule.blocks,
        firsts=schedule.firsts,
        P=num_pairs,
        D=width,
        G=cells,
        ACTIVATION=activation.value,
        BLOCK_P=tiles.height,
        BLOCK_D=side(width, tiles.inner),
        BLOCK_G=block_g,
    )
    if sums is None:
        return h, dups, None
    return h, dups, sums[0] if num_tiles == 1 else sums.sum(0)


@triton.jit
def up_kernel(
    x: tl.tensor,
    keys: tl.tensor,
    ups: tl.tensor,
    h: tl.tensor,
    gates: tl.tensor,
    rows: tl.tensor,
    offsets: tl.tensor,
    blocks: tl.tensor,
    firsts: tl.tensor,
    D: tl.tensor,
    G: tl.tensor,
    ACTIVATION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,
) -> None:
    """`up_activated`: a program owns BLOCK_P pairs of one block and BLOCK_G of its cells.

    Cells are the fast index of the grid, so that neighbouring programs share rows in the L2.
    """
    GATED: tl.constexpr = ACTIVATION == "swiglu" or ACTIVATION == "quick_geglu"
    N = 2 * G if GATED else G
    num_g = tl.cdiv(G, BLOCK_G)
    i_t, i_g = tl.program_id(0) // num_g, tl.program_id(0) % num_g
    i_b = tl.load(blocks + i_t)
    first, last = tl.load(firsts + i_t), tl.load(offsets + i_b + 1)
    if first >= last:
        return
    o_p = first + tl.arange(0, BLOCK_P)
    m_p = o_p < last
    # After the last pair the tile reads row 0, which needs no mask in the loop; the store has one.
    o_r = tl.load(rows + o_p, mask=m_p, other=0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    o_g = i_g * BLOCK_G + tl.arange(0, BLOCK_G)
    m_g = o_g < G
    p_x = x + o_r[:, None] * D + o_d[None, :]
    p_k = keys + i_b * N * D + o_g[None, :] * D + o_d[:, None]
    acc = tl.zeros((BLOCK_P, BLOCK_G), dtype=tl.float32)
    if GATED:
        linear = tl.zeros((BLOCK_P, BLOCK_G), dtype=tl.float32)
    for d in range(0, D, BLOCK_D):
        m_d = o_d < D - d
        m_k = m_d[:, None] & m_g[None, :]
        # [BLOCK_P, BLOCK_D] and [BLOCK_D, BLOCK_G]
        b_x = tl.load(p_x, mask=m_d[None, :], other=0.0)
        acc = tl.dot(b_x, tl.load(p_k, mask=m_k, other=0.0), acc, input_precision="ieee")
        if GATED:
            # The linear keys of a block follow its G gate keys.
            b_k = tl.load(p_k + G * D, mask=m_k, other=0.0)
            linear = tl.dot(b_x, b_k, linear, input_precision="ieee")
        p_x += BLOCK_D
        p_k += BLOCK_D
    b_g = None
    if gates is not None:
        b_g = tl.load(gates + o_p, mask=m_p, other=0.0)[:, None]
    i_g *= BLOCK_G  # from the index of a tile to its first cell
    if GATED:
        store_activated(acc, linear, ups, h, b_g, o_p, m_p, i_g, N, G, ACTIVATION)
    else:
        store_activated(acc, None, ups, h, b_g, o_p, m_p, i_g, N, G, ACTIVATION)


@triton.jit
def store_activated(
    acc: tl.tensor,
    linear: tl.tensor,
    ups: tl.tensor,
    h: tl.tensor,
    b_g: tl.tensor,
    o_p: tl.tensor,
    m_p: tl.tensor,
    first: tl.tensor,
    N: tl.tensor,
    G: tl.tensor,
    ACTIVATION: tl.constexpr,
) -> None:
    """Store a tile of up projections from cell `first` on, and the coefficients of its cells."""
    COLUMNS: tl.constexpr = acc.shape[1]
    # Halve the tile until it has PIECE columns, so that the epilogue fits in the registers that the
    # accumulators leave. The recursion is resolved at compile time.
    if COLUMNS > PIECE:
        left, right = halves(acc)
        half = first + COLUMNS // 2
        if linear is None:
            store_activated(left, None, ups, h, b_g, o_p, m_p, first, N, G, ACTIVATION)
            store_activated(right, None, ups, h, b_g, o_p, m_p, half, N, G, ACTIVATION)
        else:
            left_l, right_l = halves(linear)
            store_activated(left, left_l, ups, h, b_g, o_p, m_p, first, N, G, ACTIVATION)
            store_activated(right, right_l, ups, h, b_g, o_p, m_p, half, N, G, ACTIVATION)
    else:
        o_g = first + tl.arange(0, COLUMNS)
        m_pg = m_p[:, None] & (o_g < G)[None, :]
        p_u = ups + o_p[:, None] * N + o_g[None, :]
        b_u = acc.to(ups.dtype.element_ty)
        tl.store(p_u, b_u, mask=m_pg)
        # Activate the rounded number, which is the one that the backward pass will read.
        if linear is None:
            b_h = activate(b_u.to(tl.float32), ACTIVATION)
        else:
            b_l = linear.to(ups.dtype.element_ty)
            tl.store(p_u + G, b_l, mask=m_pg)
            b_h = activate_gated(b_u.to(tl.float32), b_l.to(tl.float32), ACTIVATION)
        if b_g is not None:
            b_h *= b_g
        tl.store(h + o_p[:, None] * G + o_g[None, :], b_h.to(h.dtype.element_ty), mask=m_pg)


@triton.jit(do_not_specialize=["P"])
def down_backward_kernel(
    dy: tl.tensor,
    values: tl.tensor,
    ups: tl.tensor,
    h: tl.tensor,
    dups: tl.tensor,
    gates: tl.tensor,
    sums: tl.tensor,
    rows: tl.tensor,
    offsets: tl.tensor,
    blocks: tl.tensor,
    firsts: tl.tensor,
    P: tl.tensor,
    D: tl.tensor,
    G: tl.tensor,
    ACTIVATION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,
) -> None:
    """`down_backward_activated`: a program owns the same tile as in `up_kernel`.

    `sums` is `[tiles of a block, P]`: each tile writes its own row, so that no atomics are needed.
    """
    GATED: tl.constexpr = ACTIVATION == "swiglu" or ACTIVATION == "quick_geglu"
    N = 2 * G if GATED else G
    num_g = tl.cdiv(G, BLOCK_G)
    i_t, i_g = tl.program_id(0) // num_g, tl.program_id(0) % num_g
    i_b = tl.load(blocks + i_t)
    first, last = tl.load(firsts + i_t), tl.load(offsets + i_b + 1)
    if first >= last:
        return
    o_p = first + tl.arange(0, BLOCK_P)
    m_p = o_p < last
    o_r = tl.load(rows + o_p, mask=m_p, other=0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    o_g = i_g * BLOCK_G + tl.arange(0, BLOCK_G)
    m_g = o_g < G
    p_y = dy + o_r[:, None] * D + o_d[None, :]
    p_v = values + i_b * G * D + o_g[None, :] * D + o_d[:, None]
    grad = tl.zeros((BLOCK_P, BLOCK_G), dtype=tl.float32)
    for d in range(0, D, BLOCK_D):
        m_d = o_d < D - d
        # [BLOCK_P, BLOCK_D] and [BLOCK_D, BLOCK_G]
        b_y = tl.load(p_y, mask=m_d[None, :], other=0.0)
        b_v = tl.load(p_v, mask=m_d[:, None] & m_g[None, :], other=0.0)
        grad = tl.dot(b_y, b_v, grad, input_precision="ieee")
        p_y += BLOCK_D
        p_v += BLOCK_D
    b_g = None
    if gates is not None:
        b_g = tl.load(gates + o_p, mask=m_p, other=0.0)[:, None]
    total = store_gradients(grad, ups, h, dups, b_g, o_p, m_p, i_g * BLOCK_G, N, G, ACTIVATION)
    if gates is not None:
        tl.store(sums + i_g.to(tl.int64) * P + o_p, total, mask=m_p)


@triton.jit
def store_gradients(
    grad: tl.tensor,
    ups: tl.tensor,
    h: tl.tensor,
    dups: tl.tensor,
    b_g: tl.tensor,
    o_p: tl.tensor,
    m_p: tl.tensor,
    first: tl.tensor,
    N: tl.tensor,
    G: tl.tensor,
    ACTIVATION: tl.constexpr,
) -> tl.tensor:
    """From the coefficients' gradients of a tile, from cell `first` on, store h and dups.

    Returns:
        The tile's share of the gates' gradients, `[BLOCK_P]`.
    """
    COLUMNS: tl.constexpr = grad.shape[1]
    if COLUMNS > PIECE:
        left, right = halves(grad)
        half = first + COLUMNS // 2
        total = store_gradients(left, ups, h, dups, b_g, o_p, m_p, first, N, G, ACTIVATION)
        total += store_gradients(right, ups, h, dups, b_g, o_p, m_p, half, N, G, ACTIVATION)
    else:
        o_g = first + tl.arange(0, COLUMNS)
        m_pg = m_p[:, None] & (o_g < G)[None, :]
        o_u = o_p[:, None] * N + o_g[None, :]
        b_u = tl.load(ups + o_u, mask=m_pg, other=0.0).to(tl.float32)
        if ACTIVATION == "swiglu" or ACTIVATION == "quick_geglu":
            b_l = tl.load(ups + o_u + G, mask=m_pg, other=0.0).to(tl.float32)
            b_h = activate_gated(b_u, b_l, ACTIVATION)
        else:
            b_h = activate(b_u, ACTIVATION)
        # After the last cell `grad` is zero times dy, which is NaN if dy is not finite.
        total = tl.sum(tl.where((o_g < G)[None, :], b_h * grad, 0.0), axis=1)
        if b_g is not None:
            b_h *= b_g
            grad *= b_g
        tl.store(h + o_p[:, None] * G + o_g[None, :], b_h.to(h.dtype.element_ty), mask=m_pg)
        if ACTIVATION == "swiglu" or ACTIVATION == "quick_geglu":
            grad, d_linear = activate_gated_backward(grad, b_u, b_l, ACTIVATION)
            tl.store(dups + o_u + G, d_linear.to(dups.dtype.element_ty), mask=m_pg)
        else:
            grad = activate_backward(grad, b_u, ACTIVATION)
        tl.store(dups + o_u, grad.to(dups.dtype.element_ty), mask=m_pg)
    return total
