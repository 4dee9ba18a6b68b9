"""RandHash: a fixed random map from the input token's id to K blocks (arXiv 2305.13999; HashLayer,
Roller et al. 2021). No parameter, no gate, no balance loss.

The K blocks of an id are the first K images of a permutation of the B blocks that is keyed by the
id, the layer and the seed: distinct by construction. The permutation is a Feistel network with
cycle walking, in integer arithmetic only, so that the map is the same on every device, layout and
version of any random-number library, and a checkpoint need not carry it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sffn.config import RouterConfig, flag
from megatron_sffn.routers.base import Router, Routing


@dataclass(frozen=True, kw_only=True)
class RandHashConfig(RouterConfig):
    """Settings of RandHash."""

    name = "rand-hash"
    summary = "a fixed random set of blocks for every token id; selection costs nothing"

    needs_token_ids = True

    seed: int = flag("--sffn-hash-seed", default=42, help="seed of the map (rand-hash)")
    shared: bool = flag(
        "--sffn-hash-shared", default=False, help="the same map in all layers (rand-hash)"
    )

    def build(self) -> type[RandHashRouter]:
        """See `RouterConfig.build`."""
        return RandHashRouter


class RandHashRouter(Router):
    """Blocks by a keyed permutation of the token id."""

    def forward(self, x: Tensor, keys: Tensor, token_ids: Tensor | None = None) -> Routing:
        """See `Router.forward`."""
        assert isinstance(self.sffn.router, RandHashConfig)
        assert token_ids is not None, (
            "rand-hash needs the input ids: give them to the layer (or Megatron's GPTModel) as "
            "`padding_mask`, the slot for numbers of a token that reaches every pipeline stage"
        )
        ids, position = token_ids.unique(return_inverse=True)
        layer = 0 if self.sffn.router.shared else self.layer_number
        assert layer is not None, "rand-hash needs the layer number"
        blocks = hashed_blocks(
            ids,
            num_blocks=self.sffn.num_blocks,
            num_active=self.sffn.num_active_blocks,
            key=self.sffn.router.seed * 1_000_003 + layer,
        )
        return Routing(block_ids=blocks[position])


def hashed_blocks(token_ids: Tensor, *, num_blocks: int, num_active: int, key: int) -> Tensor:
    """The blocks of each id.

    Args:
        token_ids: `[N]` int64.
        num_blocks: B.
        num_active: K, at most B.
        key: seed and layer in one number.

    Returns:
        `[N, K]` int64, ascending, distinct within a row.
    """
    half_bits = max(1, ((num_blocks - 1).bit_length() + 1) // 2)
    keys = _mix(token_ids.long()[:, None] + _mix(torch.tensor(key, device=token_ids.device)))
    blocks = torch.arange(num_active, device=token_ids.device).expand(len(token_ids), -1)
    blocks = _feistel(blocks, keys, half_bits)
    # The network permutes a power of four at least B: walk the cycle until inside. It ends, since
    # the cycle returns to its start, which is inside.
    while (outside := blocks >= num_blocks).any():
        blocks = torch.where(outside, _feistel(blocks, keys, half_bits), blocks)
    return blocks.sort(dim=1).values


def _feistel(values: Tensor, keys: Tensor, half_bits: int) -> Tensor:
    """A keyed permutation of [0, 4^half_bits)."""
    mask = (1 << half_bits) - 1
    left, right = values >> half_bits, values & mask
    for turn in range(4):
        left, right = right, left ^ (_mix(right + keys + turn * 0x5851F42D) & mask)
    return (left << half_bits) | right


def _mix(values: Tensor) -> Tensor:
    """Spread every bit over the low 32 (multiply and xor-shift, kept below 2^63)."""
    values = values & 0xFFFFFFFF
    for multiplier in (0x7FEB352D, 0x2C1B3C6D):
        values = values ^ (values >> 16)
        values = (values * multiplier) & 0xFFFFFFFF
    return values ^ (values >> 16)
