"""Choices that follow from names: the same on every rank, device, layout and version of torch.

Enters: names, such as a layer's number or token ids. Leaves: seeds of generators, and subsets. In
integer arithmetic only.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

TURNS = 12
"""Of the Feistel network. With 4, permutations of fewer than 256 numbers were uneven: of 16 blocks
some were chosen 7 % more often than others, some pairs twice as often as they should."""


def seed_of(*names: object) -> int:
    """A seed for what these names say; 32 bits, as many as torch's CPU generator reads."""
    name = "/".join(map(str, names))
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest())


def hashed_subsets(names: Tensor, *, size: int, count: int, key: int) -> Tensor:
    """For each name, `count` of the numbers below `size`.

    They are the first images of a permutation that is keyed by the name: distinct by construction.
    The permutation is a Feistel network with cycle walking. The host waits for the device in every
    turn of the walk: call it once and keep the result, where that is possible.

    Args:
        names: `[N]` int64.
        size: how many numbers there are.
        count: at most `size`.
        key: of the whole map.

    Returns:
        `[N, count]` int64, ascending, distinct within a row.
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    keys = _mix(names.long()[:, None] + _mix(torch.full((1,), key, device=names.device)))
    images = torch.arange(count, device=names.device).expand(len(names), -1)
    images = _feistel(images, keys, half_bits)
    # The network permutes a power of four at least B: walk the cycle until inside. It ends, since
    # the cycle returns to its start, which is inside.
    while (outside := images >= size).any():
        images = torch.where(outside, _feistel(images, keys, half_bits), images)
    return images.sort(dim=1).values


def _feistel(values: Tensor, keys: Tensor, half_bits: int) -> Tensor:
    """A keyed permutation of [0, 4^half_bits)."""
    mask = (1 << half_bits) - 1
    left, right = values >> half_bits, values & mask
    for turn in range(TURNS):
        left, right = right, left ^ (_mix(right + keys + turn * 0x5851F42D) & mask)
    return (left << half_bits) | right


def _mix(values: Tensor) -> Tensor:
    """Spread every bit over the low 32 (multiply and xor-shift, kept below 2^63)."""
    values = values & 0xFFFFFFFF
    for multiplier in (0x7FEB352D, 0x2C1B3C6D):
        values = values ^ (values >> 16)
        values = (values * multiplier) & 0xFFFFFFFF
    return values ^ (values >> 16)
