"""Maps from token ids to blocks that balance the load by how often each id occurs.

Inputs: counts of the ids `[V]`. Outputs: K distinct blocks of every id `[V, K]`.

Design notes: the balanced hash of hash layers (Roller et al. 2021) gives ids in the order of their
counts, the most frequent first, to the emptiest blocks. With K > 1 the K emptiest of all blocks
would be the same K again and again: blocks that got an id together have equal loads, so all ids
would share B/K fixed sets of blocks. So an id has the K emptiest of a hashed subset of the blocks,
which is ours. It also makes the maps of two layers differ.
"""

from __future__ import annotations

import numpy
import torch
from torch import Tensor

from megatron_sffn.utils.hashing import hashed_subsets

MOST_CANDIDATES = 64
"""Blocks among which an id gets the emptiest, or four times K if that is more."""

HASHED_CANDIDATES = 1 << 22
"""Candidates that are hashed at once: each takes 8 bytes in several temporary tensors."""


def balanced_map(counts: Tensor, *, num_blocks: int, num_active: int, key: int) -> Tensor:
    """Give every id the emptiest of its candidate blocks; all arithmetic is on integers.

    Args:
        counts: `[V]` int64 occurrences of every id, on the CPU.
        num_blocks: B.
        num_active: K, blocks of an id.
        key: another key gives another map.

    Returns:
        `[V, K]` int32, ascending, distinct within a row.
    """
    # An id adds a little to the load beside its count, so that ids that do not occur spread, too.
    weights = counts.numpy() * len(counts) + 1
    ids = numpy.argsort(-weights, kind="stable")
    loads = numpy.zeros(num_blocks, numpy.int64)
    blocks_VK = numpy.empty((len(ids), num_active), numpy.int32)
    candidates = num_candidates(num_blocks, num_active)
    for chunk in torch.from_numpy(ids).split(max(1, HASHED_CANDIDATES // candidates)):
        subsets = hashed_subsets(chunk, size=num_blocks, count=candidates, key=key).numpy()
        for id_, subset in zip(chunk.tolist(), subsets, strict=True):
            emptiest = subset[loads[subset].argsort(kind="stable")[:num_active]]
            loads[emptiest] += weights[id_]
            blocks_VK[id_] = emptiest
    blocks_VK.sort(axis=1)
    return torch.from_numpy(blocks_VK)


def num_candidates(num_blocks: int, num_active: int) -> int:
    """Size of the subset of an id: halfway from K to B at most, so that subsets differ."""
    return min((num_active + num_blocks + 1) // 2, max(4 * num_active, MOST_CANDIDATES))
