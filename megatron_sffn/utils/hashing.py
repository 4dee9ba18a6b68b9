"""Seeds and subsets that depend on names alone, not on rank, device, layout or torch's version.

Inputs: names, such as a layer's number or token ids. Outputs: seeds of generators, and subsets of
integers. All arithmetic is on integers.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

ROUNDS = 12
"""Rounds of the Feistel network. With 4 rounds, permutations of fewer than 256 numbers were uneven:
some of 16 blocks were chosen 7 % more often than others, and some pairs twice as often as expected.
"""


def seed_of(*names: object) -> int:
    """A seed from names; it has 32 bits, because torch's CPU generator reads no more."""
    name = "/".join(map(str, names))
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest())


def hashed_subsets(names: Tensor, *, size: int, count: int, key: int) -> Tensor:
    """For each name, `count` distinct numbers below `size`.

    They are the first images of a permutation that is keyed by the name, so they are distinct. The
    permutation is a Feistel network with cycle walking. The host waits for the device in every step
    of the walk: call this once and keep the result, if possible.

    Args:
        names: `[N]` int64.
        size: the numbers are below this.
        count: numbers per name, at most `size`.
        key: another key gives other subsets.

    Returns:
        `[N, count]` int64, ascending, distinct within a row.
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    keys = _mix(names.long()[:, None] + _mix(torch.full((1,), key, device=names.device)))
    images = torch.arange(count, device=names.device).expand(len(names), -1)
    images = _feistel(images, keys, half_bits)
    # The network permutes a power of four that is at least `size`: apply it again until the image
    # is below `size`. This ends, because the cycle returns to its start, which is below `size`.
    while (outside := images >= size).any():
        images = torch.where(outside, _feistel(images, keys, half_bits), images)
    return images.sort(dim=1).values


def ngram_keys(ids_bs: Tensor, length: int) -> Tensor:
    """A number for each n-gram: the ids of a position and of the positions before it.

    Args:
        ids_bs: `[b, s]` int64 ids, at least 0, of sequences from their start.
        length: ids of an n-gram; those before the start of a sequence are all the same.

    Returns:
        `[b, s]` int64 of 32 bits; different n-grams have different numbers but for chance.
    """
    keys = _mix(ids_bs + 1)
    for distance in range(1, length):
        previous = torch.zeros_like(ids_bs)
        previous[:, distance:] = ids_bs[:, :-distance] + 1
        keys = _mix(keys * 0x5851F42D + previous)
    return keys


def _feistel(values: Tensor, keys: Tensor, half_bits: int) -> Tensor:
    """A keyed permutation of [0, 4^half_bits)."""
    mask = (1 << half_bits) - 1
    left, right = values >> half_bits, values & mask
    for round_ in range(ROUNDS):
        left, right = right, left ^ (_mix(right + keys + round_ * 0x5851F42D) & mask)
    return (left << half_bits) | right


def _mix(values: Tensor) -> Tensor:
    """Mix every bit into the low 32 (multiply and xor-shift; all products stay below 2^63)."""
    values = values & 0xFFFFFFFF
    for multiplier in (0x7FEB352D, 0x2C1B3C6D):
        values = values ^ (values >> 16)
        values = (values * multiplier) & 0xFFFFFFFF
    return values ^ (values >> 16)
