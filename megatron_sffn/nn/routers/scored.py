"""Routers that score all B blocks: score, choose, gate. A method says where the scores come from.

Enters: tokens `[T, D]`, this rank's keys. Leaves: the `Routing` of the K best blocks.

    scores     [T, B]   of the method (`score`)
    choice     [T, B]   what the blocks are chosen by: the scores, or what the gate makes of them
                        plus the balance bias; dropped blocks last
    block_ids  [T, K]   the largest
    gates      [T, K]   none, sigmoid or softmax of the scores

Choices
- No gradient passes through the choice. The scores are differentiated only if a gate or a balance
  loss asks for it, so that Avg-K and VanillaM cost no backward by default, as in their paper.
- Block dropout (sigma-MoE's expert dropout, arXiv 2310.10837): a dropped block is chosen only when
  fewer than K others are left, and then its place stays empty: a token may have less than K blocks,
  never a score of a block that was dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from megatron_sffn.nn.config import (
    RouterConfig,
    SparseFFNConfig,
    SparseFFNTransformerConfig,
    flag,
)
from megatron_sffn.nn.load_balancing import LoadBalancing, losses_reach_scores
from megatron_sffn.nn.routers.base import NO_BLOCK, Router, Routing
from megatron_sffn.nn.routers.groups import check_groups, in_best_groups
from megatron_sffn.utils.errors import ConfigError

GATES: dict[str, Callable[[Tensor, Tensor], Tensor | None]] = {
    "none": lambda scores, ids: None,
    "sigmoid": lambda scores, ids: scores.gather(1, ids).sigmoid(),
    "softmax": lambda scores, ids: scores.softmax(dim=-1).gather(1, ids),
    "softmax-chosen": lambda scores, ids: scores.gather(1, ids).softmax(dim=-1),
}
"""From scores `[T, B]` and ids `[T, K]` to gates `[T, K]`."""

FACTORS = (
    "moe_aux_loss_coeff",
    "moe_z_loss_coeff",
    "moe_router_bias_update_rate",
    "moe_input_jitter_eps",
)
"""Fields of Megatron's config that multiply something in our routers."""


@dataclass(frozen=True, kw_only=True)
class ScoredConfig(RouterConfig):
    """What all methods with scores share."""

    megatron_flags: ClassVar[tuple[str, ...]] = (
        "moe_router_load_balancing_type",
        "moe_aux_loss_coeff",
        "moe_z_loss_coeff",
        "moe_router_enable_expert_bias",
        "moe_router_bias_update_rate",
        "moe_router_num_groups",
        "moe_router_group_topk",
    )
    default_gate: ClassVar[str] = "none"
    """Of `GATES`, where `--sffn-gate` is not given."""

    gate: str | None = flag(
        "--sffn-gate",
        default=None,
        kind=str,
        choices=tuple(GATES),
        help="factor of a chosen block's output, from its score: none, its sigmoid, its softmax "
        "over all blocks or over the chosen; by default as the method's paper has it (avg-k, "
        "vanilla-m, lorkm: none; switch: softmax; sigma-moe: sigmoid), any other is ours",
    )
    entropy_coefficient: float = flag(
        "--sffn-entropy-coeff",
        default=0.0,
        least=0.0,
        training_only=True,
        help="γ, weight of the entropy of the mean choice (sigma-moe: 1e-3 or 1e-4 in its paper; "
        "on other routers ours)",
    )
    block_dropout: float = flag(
        "--sffn-block-dropout",
        default=0.0,
        least=0.0,
        most=1.0,
        training_only=True,
        help="δ, probability that a token cannot choose a block in training (sigma-moe: 0 to 0.1 "
        "in its paper; on other routers ours)",
    )

    def __post_init__(self) -> None:
        """Fill in the gate, then check."""
        object.__setattr__(self, "gate", self.gate or self.default_gate)
        super().__post_init__()

    def check_model(self, config: SparseFFNTransformerConfig) -> None:
        """See `RouterConfig.check_model`."""
        sffn = config.sffn
        assert sffn is not None, "a router is checked in a model that has it"
        check_groups(config, sffn.num_blocks, sffn.num_active_blocks)
        for name in FACTORS:
            value = getattr(config, name)
            for number in value if isinstance(value, list) else [value]:
                if number is not None and not 0 <= number < math.inf:
                    raise ConfigError(
                        f"--{name.replace('_', '-')} {number} is not a finite number of at least "
                        "0; give one, or leave it out"
                    )
        constant = self._constant_gate(sffn)
        if constant is not None and not self.scores_have_weights:
            raise ConfigError(f"{constant}, which has no effect; leave it out")

    def untrained(self, config: SparseFFNTransformerConfig) -> str | None:
        """See `RouterConfig.untrained`: scores learn by a gate of them, or by a balance loss."""
        assert config.sffn is not None, "a router is checked in a model that has it"
        constant = self._constant_gate(config.sffn)
        gated = self.gated_output and constant is None
        if not self.scores_have_weights or gated:
            return None
        if losses_reach_scores(config, self.entropy_coefficient):
            return None
        if constant is None:
            return (
                "with --sffn-gate none no gradient passes through the choice; use --sffn-gate "
                "sigmoid or softmax, or a balance loss (--moe-aux-loss-coeff 0.01)"
            )
        return (
            f"{constant}; use --sffn-gate sigmoid or softmax, a smaller --sffn-block-size, or a "
            "balance loss (--moe-aux-loss-coeff 0.01)"
            if config.sffn.num_blocks > 1
            else f"{constant}; use --sffn-gate sigmoid, or a larger --sffn-expansion"
        )

    def remark(self, sffn: SparseFFNConfig) -> str | None:
        """A softmax over all blocks leaves several chosen ones little at first."""
        active, blocks = sffn.num_active_blocks, sffn.num_blocks
        if self.gate != "softmax" or not 1 < active < blocks:
            return None
        return (
            f"--sffn-router {self.name}: the gates of the {active} blocks of a token are their "
            f"probabilities among all {blocks}, and add up to about {active / blocks:.2g} at "
            "first: the sparse layers add that much less than dense ones would, and perplexity can "
            "look broken; with --sffn-gate softmax-chosen they add up to 1"
        )

    def _constant_gate(self, sffn: SparseFFNConfig) -> str | None:
        """That the gate is 1 whatever the scores are, if it is: the start of a sentence."""
        if self.gate == "softmax-chosen" and sffn.num_active_blocks == 1:
            return "--sffn-gate softmax-chosen is always 1 for one chosen block"
        if self.softmax_over_blocks and sffn.num_blocks == 1:
            return f"--sffn-gate {self.gate} is always 1 for one block in all"
        return None

    @property
    def scores_have_weights(self) -> bool:
        """Whether scores depend on weights of the router's own that act on nothing else."""
        return False

    @property
    def gated_output(self) -> bool:
        """See `RouterConfig.gated_output`."""
        return self.gate != "none"

    @property
    def softmax_over_blocks(self) -> bool:
        """See `RouterConfig.softmax_over_blocks`."""
        return self.gate in ("softmax", "softmax-chosen")


class ScoredRouter(Router):
    """The K blocks of largest score. Arguments as `Router`."""

    settings: ScoredConfig

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        assert isinstance(self.sffn.router, ScoredConfig)
        self.settings = self.sffn.router
        self.balance = LoadBalancing(
            self.config, arguments["pg_collection"], self.settings.entropy_coefficient
        )

    def set_layer_number(self, layer_number: int) -> None:
        """See `Router.set_layer_number`."""
        super().set_layer_number(layer_number)
        self.balance.layer_number = layer_number

    def query(self, x: Tensor) -> Tensor:
        """`[T, key width]` what meets the keys; the tokens unless a method says else."""
        return x

    def score(self, x: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
        """`[T, B]` scores, fp32 at least; under `no_grad` where no gradient is needed."""
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        keys: Tensor | None,
        token_ids: Tensor | None = None,
        num_sequences: int = 1,
    ) -> Routing:
        """See `Router.forward`."""
        assert keys is not None, "blocks are scored by tokens and keys"
        queries = self.query(x)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.differentiates):
            scores = self.score(x, queries, keys)
        self.flag_not_finite(scores)
        ids, dropped = self._choose(scores)
        gates = GATES[str(self.settings.gate)](scores, ids)
        chosen = scores.detach().gather(1, ids)
        if dropped is not None:
            ids = ids.masked_fill(dropped, NO_BLOCK)
        rows = self.balance(queries, scores, ids, num_sequences)
        routing = Routing(
            block_ids=ids,
            gates=gates,
            queries=None if rows is x else rows,
            scores=chosen,
            may_be_empty=dropped is not None,
        )
        return self.post_route(x, routing)

    def post_route(self, x: Tensor, routing: Routing) -> Routing:
        """What a method still does with the blocks of its tokens; nothing, unless it says else."""
        return routing

    @property
    def differentiates(self) -> bool:
        """Whether a gradient passes through the scores."""
        return self.settings.gated_output or self.balance.differentiates

    @torch.no_grad()
    def _choose(self, scores: Tensor) -> tuple[Tensor, Tensor | None]:
        """`[T, K]` ids, and which of them are dropped, if any can be."""
        choice, dropout = self.selection_scores(scores), self.settings.block_dropout
        if self.balance.biased:
            choice = choice + self.balance.expert_bias
        active, drops = self.sffn.num_active_blocks, self.training and bool(dropout)
        unavailable = torch.rand_like(scores) < dropout if drops else None
        if unavailable is not None:
            choice = choice.masked_fill(unavailable, -torch.inf)
        if num_groups := self.config.moe_router_num_groups:
            group_topk = self.config.moe_router_group_topk
            allowed = in_best_groups(choice, active, num_groups, group_topk, self.topk)
            choice = choice.masked_fill(~allowed, -torch.inf)
            # Of blocks that cannot be chosen the lowest come first, from any group.
            unavailable = None if unavailable is None else unavailable | ~allowed
        ids = self.topk(choice, active)
        return ids, None if unavailable is None else unavailable.gather(1, ids)

    def selection_scores(self, scores: Tensor) -> Tensor:
        """`[T, B]` what blocks are chosen by: in units of the gate, if a bias is added to it."""
        if not self.balance.biased or not self.settings.gated_output:
            return scores
        return scores.sigmoid() if self.settings.gate == "sigmoid" else scores.softmax(dim=-1)
