"""Measures of a layer's routing, computed from the blocks of recorded tokens.

Inputs: a `RoutingTrace`, or two traces of the same tokens. Outputs: numbers and small matrices.
Every measure is compared with chance: a layer that chose at random with the same load would have a
co-activation of 1, and an overlap or drift of the value that is printed beside it.

Design notes: matrices cover the `top` most used blocks and are never B × B, since there are 65,536
blocks at g = 1.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy
from numpy.typing import NDArray

Ints = NDArray[numpy.integer]
Floats = NDArray[numpy.float64]

CHUNK = 1024
"""Tokens whose `[tokens, B]` map is in RAM at once."""


def load_of(blocks: Ints, num_blocks: int) -> Ints:
    """`[B]`, the tokens of each block.

    Args:
        blocks: `[T, K]`; -1 is a place that stayed empty.
        num_blocks: B.
    """
    return numpy.bincount(blocks.ravel().astype(numpy.int64) + 1, minlength=num_blocks + 1)[1:]


def most_used(load: Ints, top: int) -> Ints:
    """The blocks of largest load in descending order, at most `top`, without dead blocks."""
    order = numpy.argsort(-load, kind="stable")[:top]
    return order[load[order] > 0]


def members(blocks: Ints, block_ids: Ints, num_blocks: int) -> NDArray[numpy.bool_]:
    """`[T, n]`, True if a token has each of n blocks."""
    # Index -1, an empty place, reads the last entry, which stays -1.
    column_of = numpy.full(num_blocks + 1, -1)
    column_of[block_ids] = numpy.arange(len(block_ids))
    columns_TK = column_of[blocks]
    is_member = numpy.zeros((len(blocks), len(block_ids)), dtype=numpy.bool_)
    tokens, places = numpy.nonzero(columns_TK >= 0)
    is_member[tokens, columns_TK[tokens, places]] = True
    return is_member


def coactivation(blocks: Ints, block_ids: Ints, num_blocks: int) -> Floats:
    """How often two blocks have the same token, relative to chance.

    Args:
        blocks: `[T, K]`.
        block_ids: `[n]` blocks to compare, none of them dead.
        num_blocks: B.

    Returns:
        `[n, n]`: tokens with both blocks, divided by the tokens that independent blocks of the same
        load would share; 1 is chance, the diagonal is NaN.
    """
    is_member = members(blocks, block_ids, num_blocks).astype(numpy.float32)
    load = is_member.sum(axis=0, dtype=numpy.float64)
    ratio = (is_member.T @ is_member).astype(numpy.float64) * len(blocks) / numpy.outer(load, load)
    numpy.fill_diagonal(ratio, numpy.nan)
    return ratio


def alike_together(matrix: Floats) -> Ints:
    """An order in which similar rows are neighbours: by the leading eigenvector."""
    if len(matrix) < 3:
        return numpy.arange(len(matrix))
    filled = numpy.log2(numpy.nan_to_num(matrix, nan=1.0) + 1 / 16)
    centred = filled - filled.mean()
    _, vectors = numpy.linalg.eigh((centred + centred.T) / 2)
    return numpy.argsort(vectors[:, -1], kind="stable")


def token_counts(blocks: Ints, token_ids: Ints, block_ids: Ints, num_blocks: int) -> Floats:
    """`[n, V]`, how often each of n blocks served each of the V token ids that occur."""
    _, ids = numpy.unique(token_ids, return_inverse=True)
    rows, columns = numpy.nonzero(members(blocks, block_ids, num_blocks))
    num_ids = int(ids.max()) + 1
    cells = columns * num_ids + ids[rows]
    counts = numpy.bincount(cells, minlength=len(block_ids) * num_ids)
    return counts.reshape(len(block_ids), num_ids).astype(numpy.float64)


def overlap(counts: Floats) -> Floats:
    """How similar the token ids of two blocks are: weighted Jaccard index of their shares.

    Args:
        counts: `[n, V]` from `token_counts`.

    Returns:
        `[n, n]`: Σ min / Σ max over token ids of their shares in the two blocks; 1 for equal
        shares, 0 for no common id; the diagonal is NaN.
    """
    shares = counts / counts.sum(axis=1, keepdims=True)
    minima = numpy.stack([numpy.minimum(row, shares).sum(axis=1) for row in shares])
    # The minimum and the maximum of two distributions add up to 2.
    ratio = minima / (2 - minima)
    numpy.fill_diagonal(ratio, numpy.nan)
    return ratio


def mean_of_pairs(matrix: Floats) -> float | None:
    """Mean off the diagonal; None for fewer than two blocks."""
    return float(numpy.nanmean(matrix)) if len(matrix) > 1 else None


def kept(before: Ints, after: Ints, num_blocks: int) -> float:
    """Share of a token's blocks that it keeps; a block that two heads chose counts once.

    Args:
        before: `[T, K]`.
        after: `[T, K]`, of the same tokens.
        num_blocks: B.
    """
    num_kept = num_before = 0
    for old_map, new_map in zip(_maps(before, num_blocks), _maps(after, num_blocks), strict=True):
        num_kept += int((old_map & new_map).sum())
        num_before += int(old_map.sum())
    return num_kept / max(num_before, 1)


def kept_by_chance(before: Ints, after: Ints, num_blocks: int) -> float:
    """The value of `kept` for tokens that choose at random, with the same load of each block.

    Args:
        before: `[T, K]`.
        after: `[T, K]`.
        num_blocks: B.
    """
    load_before, load_after = (
        numpy.sum([map_.sum(axis=0) for map_ in _maps(blocks, num_blocks)], axis=0, dtype=float)
        for blocks in (before, after)
    )
    return float((load_before * load_after).sum() / max(load_before.sum() * len(before), 1.0))


def _maps(blocks: Ints, num_blocks: int) -> Iterator[NDArray[numpy.bool_]]:
    """`[tokens, B]`, True if a token has a block, for a chunk of tokens at a time."""
    for start in range(0, len(blocks), CHUNK):
        chunk = blocks[start : start + CHUNK]
        # Column 0 is for empty places.
        has_block = numpy.zeros((len(chunk), num_blocks + 1), dtype=numpy.bool_)
        numpy.put_along_axis(has_block, chunk.astype(numpy.int64) + 1, True, axis=1)
        yield has_block[:, 1:]
