"""Switch: a learned gate, softmax over all blocks (Fedus et al. 2021, arXiv 2101.03961).

`p = softmax(x W_gᵀ)` in fp32; the K blocks of largest p compute, and p (over all B, not
renormalised over the chosen) multiplies their output, which is how the gate learns.

With a capacity (`--moe-expert-capacity-factor` C) a block takes at most `ceil(C·T·K/B)` of the
T tokens of a microbatch. The tokens of least probability, or the last tokens
(`--moe-token-drop-policy probs|position`), are dropped: the block adds nothing to them.
Tensor-parallel ranks decide on all tokens of the microbatch together, so that the layout does not
matter; in Megatron each rank decides alone.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar, override

import torch
from torch import Tensor

from megatron_sffn.nn.expert_grid import gather_rows
from megatron_sffn.nn.routers.base import NO_BLOCK, Routing
from megatron_sffn.nn.routers.learned import LearnedConfig, LearnedRouter
from megatron_sffn.nn.transformer_config import SparseFFNTransformerConfig
from megatron_sffn.utils.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SwitchConfig(LearnedConfig):
    """Settings of Switch."""

    name = "switch"
    summary = "learned softmax gate that multiplies the output, with a load-balance loss"
    balance_coefficient = 0.01  # Fedus et al. 2021; --moe-aux-loss-coeff overrides it
    megatron_flags: ClassVar[tuple[str, ...]] = (
        *LearnedConfig.megatron_flags,
        "moe_expert_capacity_factor",
        "moe_token_drop_policy",
    )
    default_gate = "softmax"

    @override
    def check_model(self, config: SparseFFNTransformerConfig) -> None:
        super().check_model(config)
        factor = config.moe_expert_capacity_factor
        if factor is not None and not 0 < factor < math.inf:
            raise ConfigError(
                f"--moe-expert-capacity-factor {factor} is no capacity of a block; give a finite "
                "number above 0, or leave it out for no limit"
            )

    @override
    def router_class(self) -> type[SwitchRouter]:
        return SwitchRouter


class SwitchRouter(LearnedRouter):
    """A learned softmax gate. Arguments as `Router`."""

    @override
    def post_route(self, x: Tensor, routing: Routing) -> Routing:
        # Empty the slots whose block is full.
        factor = self.config.moe_expert_capacity_factor
        if factor is None:
            return routing
        assert routing.scores is not None
        by_score = self.config.moe_token_drop_policy == "probs"
        # Without a gate there is no probability, and scores are compared.
        priority = routing.scores if routing.gates is None else routing.gates.detach()
        fits = self._fit(routing.block_ids, priority if by_score else None, factor)
        return dataclasses.replace(
            routing,
            block_ids=routing.block_ids.masked_fill(~fits, NO_BLOCK),
            may_be_empty=True,
        )

    def _fit(self, block_ids: Tensor, priority: Tensor | None, factor: float) -> Tensor:
        """A mask `[T, K]` of the choices that are within the capacity of their block."""
        group = self.balance.tp_cp_group
        ids = gather_rows(block_ids, group)
        capacity = math.ceil(factor * ids.numel() / self.sffn.num_blocks)
        if priority is not None:
            # Probabilities of a repeated word differ by rounding alone, and rounding depends on the
            # layout. In bf16 they tie, and the first token wins.
            priority = priority.bfloat16()
            priority = gather_rows(priority, group)
        fits = within_capacity(ids, priority, capacity)
        return fits.chunk(group.size())[group.rank()]


def within_capacity(block_ids: Tensor, priority: Tensor | None, capacity: int) -> Tensor:
    """The choices that blocks of limited capacity accept.

    Args:
        block_ids: `[T, K]`; negative for an empty slot.
        priority: `[T, K]`, the largest is accepted first; None for the order of the tokens.
        capacity: tokens of a block.

    Returns:
        `[T, K]` bool; among equal priorities the first tokens are accepted.
    """
    blocks = block_ids.flatten()
    order = torch.arange(len(blocks), device=blocks.device)
    if priority is not None:
        order = priority.flatten().argsort(descending=True, stable=True)
    order = order[blocks[order].argsort(stable=True)]
    ordered = blocks[order]
    # Position of each choice in its block's queue: its index minus the index of the block's first.
    position = torch.arange(len(blocks), device=blocks.device)
    position = position - torch.searchsorted(ordered, ordered)
    fits = torch.empty_like(blocks, dtype=torch.bool)
    fits[order] = (position < capacity) & (ordered >= 0)
    return fits.view_as(block_ids)
