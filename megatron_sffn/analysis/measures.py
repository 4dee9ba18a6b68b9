"""What the blocks of the same tokens say about a layer.

Enters: a `RoutingTrace`, or two of the same tokens. Leaves: numbers and small matrices. Everything
compares with chance: a layer that chose at random with the same load would have 1 (co-activation),
or the value that is given beside it (overlap, drift).

Choice: matrices are of the `top` most used blocks, never B × B: at g = 1 there are 65,536 blocks.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy
from numpy.typing import NDArray

Ints = NDArray[numpy.integer]
Floats = NDArray[numpy.float64]

CHUNK = 1024
"""Tokens whose `[tokens, B]` map is in memory at once."""


def load_of(blocks: Ints, num_blocks: int) -> Ints:
    """`[B]` tokens of each block.

    Args:
        blocks: `[T, K]`; -1 is a place that stayed empty.
        num_blocks: B.
    """
    return numpy.bincount(blocks.ravel().astype(numpy.int64) + 1, minlength=num_blocks + 1)[1:]


def most_used(load: Ints, top: int) -> Ints:
    """The blocks of largest load, at most `top`, none that is dead, in falling order."""
    order = numpy.argsort(-load, kind="stable")[:top]
    return order[load[order] > 0]


def members(blocks: Ints, chosen: Ints, num_blocks: int) -> NDArray[numpy.bool_]:
    """`[T, n]` whether each token has each of the n chosen blocks."""
    place = numpy.full(num_blocks + 1, -1)
    place[chosen] = numpy.arange(len(chosen))
    # The last entry is what -1 finds.
    places = place[blocks]
    found = numpy.zeros((len(blocks), len(chosen)), dtype=numpy.bool_)
    rows, columns = numpy.nonzero(places >= 0)
    found[rows, places[rows, columns]] = True
    return found


def coactivation(blocks: Ints, chosen: Ints, num_blocks: int) -> Floats:
    """How often two blocks have the same token, relative to chance.

    Args:
        blocks: `[T, K]`.
        chosen: `[n]` blocks to compare, none of them dead.
        num_blocks: B.

    Returns:
        `[n, n]`: tokens with both over what independent blocks of this load would share; 1 is
        chance, the diagonal is NaN.
    """
    has = members(blocks, chosen, num_blocks).astype(numpy.float32)
    load = has.sum(axis=0, dtype=numpy.float64)
    ratio = (has.T @ has).astype(numpy.float64) * len(blocks) / numpy.outer(load, load)
    numpy.fill_diagonal(ratio, numpy.nan)
    return ratio


def alike_together(matrix: Floats) -> Ints:
    """An order in which rows that look alike are neighbours: by the first direction of them."""
    if len(matrix) < 3:
        return numpy.arange(len(matrix))
    filled = numpy.log2(numpy.nan_to_num(matrix, nan=1.0) + 1 / 16)
    centred = filled - filled.mean()
    _, vectors = numpy.linalg.eigh((centred + centred.T) / 2)
    return numpy.argsort(vectors[:, -1], kind="stable")


def token_counts(blocks: Ints, token_ids: Ints, chosen: Ints, num_blocks: int) -> Floats:
    """`[n, V]` how often each chosen block served each token id, of the V ids that occur."""
    _, ids = numpy.unique(token_ids, return_inverse=True)
    rows, columns = numpy.nonzero(members(blocks, chosen, num_blocks))
    num_ids = int(ids.max()) + 1
    places = columns * num_ids + ids[rows]
    counts = numpy.bincount(places, minlength=len(chosen) * num_ids)
    return counts.reshape(len(chosen), num_ids).astype(numpy.float64)


def overlap(counts: Floats) -> Floats:
    """How alike the token ids of two blocks are: weighted Jaccard of their shares.

    Args:
        counts: `[n, V]` from `token_counts`.

    Returns:
        `[n, n]`: Σ min / Σ max over token ids of what share of the block's tokens they are; 1 for
        the same shares, 0 for no common id; the diagonal is NaN.
    """
    shares = counts / counts.sum(axis=1, keepdims=True)
    least = numpy.stack([numpy.minimum(row, shares).sum(axis=1) for row in shares])
    # Two distributions: their minimum and their maximum add up to 2.
    ratio = least / (2 - least)
    numpy.fill_diagonal(ratio, numpy.nan)
    return ratio


def mean_of_pairs(matrix: Floats) -> float | None:
    """Mean off the diagonal; None for less than two blocks."""
    return float(numpy.nanmean(matrix)) if len(matrix) > 1 else None


def kept(before: Ints, after: Ints, num_blocks: int) -> float:
    """Share of a token's blocks that it still has; a block of two heads counts once.

    Args:
        before: `[T, K]`.
        after: `[T, K]` of the same tokens.
        num_blocks: B.
    """
    both = former = 0
    for one, other in zip(_maps(before, num_blocks), _maps(after, num_blocks), strict=True):
        both += int((one & other).sum())
        former += int(one.sum())
    return both / max(former, 1)


def kept_by_chance(before: Ints, after: Ints, num_blocks: int) -> float:
    """What `kept` would be if tokens chose independently, each block as often as they do.

    Args:
        before: `[T, K]`.
        after: `[T, K]`.
        num_blocks: B.
    """
    former, latter = (
        numpy.sum([part.sum(axis=0) for part in _maps(blocks, num_blocks)], axis=0, dtype=float)
        for blocks in (before, after)
    )
    return float((former * latter).sum() / max(former.sum() * len(before), 1.0))


def _maps(blocks: Ints, num_blocks: int) -> Iterator[NDArray[numpy.bool_]]:
    """`[tokens, B]` whether a token has a block, a chunk of tokens at a time."""
    for start in range(0, len(blocks), CHUNK):
        part = blocks[start : start + CHUNK]
        found = numpy.zeros((len(part), num_blocks + 1), dtype=numpy.bool_)
        numpy.put_along_axis(found, part.astype(numpy.int64) + 1, True, axis=1)
        yield found[:, 1:]
