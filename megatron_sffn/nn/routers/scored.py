"""The base of routers that score all B blocks: score, choose, gate. A method implements `score`.

Inputs: tokens `[T, D]`, and this rank's keys. Outputs: the `Routing` of the K best blocks.

    scores            [T, B]   the method's scores (`score`)
    selection_scores  [T, B]   scores by which blocks are chosen: the scores, their gates plus the
                               expert bias, or the scores less the prices of quantile balancing;
                               dropped blocks have the lowest
    block_ids         [T, K]   ids of the largest selection scores
    gates             [T, K]   none, or a function of the scores (`gates.py`)

Design notes
- No gradient passes through the choice. The scores are differentiated only if a gate or a balance
  loss asks for it, so that Avg-K and VanillaM cost no backward by default, as in their paper.
- Block dropout (sigma-MoE's expert dropout, arXiv 2310.10837): a dropped block is chosen only when
  fewer than K others are left, and then its slot stays empty: a token may have fewer than K blocks,
  but never a block that was dropped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, override

import torch
from torch import Tensor

from megatron_sffn.nn.config import RouterConfig, SparseFFNConfig, flag
from megatron_sffn.nn.load_balancing import BALANCE_LOSSES, LoadBalancing, losses_reach_scores
from megatron_sffn.nn.quantile_balancing import check_quantile_balancing
from megatron_sffn.nn.routers.base import NO_BLOCK, Router, Routing
from megatron_sffn.nn.routers.gates import factors_of_all, gate_flag, gates_of, is_normalized
from megatron_sffn.nn.routers.groups import GROUP_SCORES, check_groups, in_best_groups
from megatron_sffn.nn.saved_bytes import FP32, INT64, LayerCall, SavedBytes
from megatron_sffn.nn.transformer_config import SparseFFNTransformerConfig
from megatron_sffn.utils.errors import ConfigError

FACTORS = (
    "moe_aux_loss_coeff",
    "moe_z_loss_coeff",
    "moe_router_bias_update_rate",
    "moe_input_jitter_eps",
)
"""Fields of Megatron's config that are factors in our routers."""


@dataclass(frozen=True, kw_only=True)
class ScoredConfig(RouterConfig):
    """Settings of every method with scores."""

    megatron_flags: ClassVar[tuple[str, ...]] = (
        "moe_router_load_balancing_type",
        "moe_aux_loss_coeff",
        "moe_z_loss_coeff",
        "moe_router_enable_expert_bias",
        "moe_router_bias_update_rate",
        "moe_router_quantile_balancing_ema",
        "moe_router_num_groups",
        "moe_router_group_topk",
        "moe_router_topk_scaling_factor",
        "moe_latent_size",
    )
    default_gate: ClassVar[str] = "none"
    """Name in `GATES` of the gate where `--sffn-gate` is not given."""

    gate: str | None = gate_flag()
    group_score: str = flag(
        "--sffn-group-score",
        default="largest",
        choices=GROUP_SCORES,
        help="with --moe-router-num-groups, the score of a group of blocks: the sum of its largest "
        "scores, as in Megatron; or their mean (ours), with which avg-k chooses large blocks and "
        "then smaller ones within them",
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
        """Fill in the default gate, then check all fields."""
        object.__setattr__(self, "gate", self.gate or self.default_gate)
        super().__post_init__()

    @override
    def check_model(self, config: SparseFFNTransformerConfig) -> None:
        sffn = config.sffn
        assert sffn is not None, "a router is checked in a model that has it"
        check_groups(config, sffn.num_blocks, sffn.num_active_blocks)
        if self.group_score != "largest" and not config.moe_router_num_groups:
            raise ConfigError(
                f"--sffn-group-score {self.group_score} has nothing to act on without "
                "--moe-router-num-groups; add it with --moe-router-group-topk, or leave it out"
            )
        for name in FACTORS:
            value = getattr(config, name)
            for number in value if isinstance(value, list) else [value]:
                if number is not None and not 0 <= number < math.inf:
                    raise ConfigError(
                        f"--{name.replace('_', '-')} {number} is not a finite number of at least "
                        "0; give one, or leave it out"
                    )
        self._check_scale(config.moe_router_topk_scaling_factor)
        check_quantile_balancing(config, sffn)
        constant = self._constant_gate(sffn)
        if constant is not None and not self.scores_have_weights:
            raise ConfigError(f"{constant}, which has no effect; leave it out")

    def _check_scale(self, factor: float | None) -> None:
        """Refuse a factor of the gates that is no positive number, or has no gates."""
        if factor is None:
            return
        shown = f"--moe-router-topk-scaling-factor {factor:g}"
        if not self.gated_output:
            raise ConfigError(
                f"{shown} multiplies gates, and --sffn-gate is none; leave it out, or use "
                "--sffn-gate sigmoid"
            )
        if not 0 < factor < math.inf:
            raise ConfigError(f"{shown} is not a finite number above 0; give for example 2.5")

    @override
    def untrained(self, config: SparseFFNTransformerConfig) -> str | None:
        # Scores learn through a gate that depends on them, or through a load-balancing loss.
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

    @override
    def remark(self, sffn: SparseFFNConfig) -> str | None:
        # A softmax over all blocks gives several chosen blocks small gates at first.
        active, blocks = sffn.num_active_blocks, sffn.num_blocks
        if self.gate != "softmax" or not 1 < active < blocks:
            return None
        return (
            f"--sffn-router {self.name}: the gates of the {active} blocks of a token are their "
            f"probabilities among all {blocks}, and add up to about {active / blocks:.2g} at "
            "first: the sparse layers add that much less than dense ones would, and perplexity can "
            "look broken; with --sffn-gate softmax-chosen they add up to 1"
        )

    @override
    def saved_bytes(self, call: LayerCall) -> SavedBytes:
        if not (self.gated_output or self._losses(call)):
            return SavedBytes()  # no gradient passes through the scores
        scores, losses = self.saved_by_scores(call), self._losses(call)
        bytes_ = scores.bytes + call.tokens * self._saved_per_token(call)
        # Each balance loss keeps the blocks' frequencies, the entropy its three factors [B], and
        # their sum is a scalar.
        per_block = len(losses & BALANCE_LOSSES.keys()) + (3 if "entropy_loss" in losses else 0)
        bytes_ += FP32 * (per_block * call.sffn.num_blocks + bool(losses))
        return SavedBytes(bytes=bytes_, tokens=scores.tokens)

    def saved_by_scores(self, call: LayerCall) -> SavedBytes:
        """Bytes that the method keeps for its score if scores are differentiated.

        Raises:
            NotImplementedError: if the method has no formula.
        """
        raise NotImplementedError(f"{type(self).__name__} has no formula for saved_by_scores")

    def _losses(self, call: LayerCall) -> frozenset[str]:
        """The losses of the scores that are on: Megatron's, and the router's entropy loss."""
        return call.losses | ({"entropy_loss"} if self.entropy_coefficient else set())

    def _saved_per_token(self, call: LayerCall) -> int:
        """Bytes per token of the gates and losses that are computed from the scores."""
        blocks, active = call.sffn.num_blocks, call.sffn.num_active_blocks
        losses = self._losses(call)
        gate = str(self.gate)
        gathers_scores = gate not in ("none", "softmax")
        count = active * INT64 if gate != "none" else 0
        if gate == "softmax":
            count += FP32 * blocks
        if gathers_scores:
            count += FP32 * active
        if gate.startswith("sqrt-softplus"):  # the scores beside the function of them
            count += FP32 * active
        if is_normalized(gate) and gate != "softmax-chosen":  # their sum
            count += FP32
        if gathers_scores or "z_loss" in losses:
            count += FP32 * blocks
        if "z_loss" in losses:
            count += FP32
        if losses - {"z_loss"}:
            count += FP32 * blocks
        return count

    def _constant_gate(self, sffn: SparseFFNConfig) -> str | None:
        """The start of a sentence that says why the gate is always 1; None if it is not."""
        if is_normalized(str(self.gate)) and sffn.num_active_blocks == 1:
            return f"--sffn-gate {self.gate} is always 1 for one chosen block"
        if self.splitting_divides_gates and sffn.num_blocks == 1:
            return f"--sffn-gate {self.gate} is always 1 for one block in all"
        return None

    @property
    def scores_have_weights(self) -> bool:
        """True if the router has weights that affect only the scores."""
        return False

    @override
    @property
    def gated_output(self) -> bool:
        return self.gate != "none"

    @override
    @property
    def splitting_divides_gates(self) -> bool:
        return self.gate == "softmax" or is_normalized(str(self.gate))


class ScoredRouter(Router):
    """Choose the K blocks of largest score. Arguments as `Router`."""

    settings: ScoredConfig

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        assert isinstance(self.sffn.router, ScoredConfig)
        self.settings = self.sffn.router
        self.balance = LoadBalancing(
            self.config, arguments["pg_collection"], self.settings.entropy_coefficient
        )

    @override
    def set_layer_number(self, layer_number: int) -> None:
        super().set_layer_number(layer_number)
        self.balance.layer_number = layer_number

    def query(self, x: Tensor) -> Tensor:
        """Queries `[T, key width]`; the tokens unless a method overrides this."""
        return x

    def score(self, x: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
        """Scores `[T, B]`, fp32 at least. Runs under `no_grad` where no gradient is needed."""
        raise NotImplementedError

    @override
    def forward(
        self,
        x: Tensor,
        keys: Tensor | None,
        token_ids: Tensor | None = None,
        num_sequences: int = 1,
    ) -> Routing:
        assert keys is not None, "blocks are scored by tokens and keys"
        queries = self.query(x)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.differentiates):
            scores = self.score(x, queries, keys)
        self.flag_not_finite(scores)
        ids, dropped = self.choose(scores)
        gates = gates_of(str(self.settings.gate), scores, ids)
        if gates is not None and (factor := self.config.moe_router_topk_scaling_factor):
            gates = gates * factor
        chosen_scores = scores.detach().gather(1, ids)
        if dropped is not None:
            ids = ids.masked_fill(dropped, NO_BLOCK)
        # The load-balancing losses hang on the queries' graph; their values do not change.
        rows = self.balance(queries, scores, ids, num_sequences)
        routing = Routing(
            block_ids=ids,
            gates=gates,
            queries=None if rows is x else rows,
            scores=chosen_scores,
            may_be_empty=dropped is not None,
        )
        return self.post_route(x, routing)

    def post_route(self, x: Tensor, routing: Routing) -> Routing:
        """A hook on the finished routing, for methods that drop tokens or observe them."""
        return routing

    @property
    def differentiates(self) -> bool:
        """True if a gradient passes through the scores."""
        return self.settings.gated_output or self.balance.differentiates

    @torch.no_grad()
    def choose(self, scores: Tensor) -> tuple[Tensor, Tensor | None]:
        """Ids `[T, K]`, and a mask `[T, K]` of the dropped ones; None if none can be dropped."""
        selection, dropout = self.selection_scores(scores), self.settings.block_dropout
        if self.balance.biased:
            selection = selection + self.balance.expert_bias
        if self.balance.priced:
            selection = selection - self.balance.qb_beta
        active, drops = self.sffn.num_active_blocks, self.training and bool(dropout)
        unavailable = torch.rand_like(scores) < dropout if drops else None
        if unavailable is not None:
            selection = selection.masked_fill(unavailable, -torch.inf)
        if num_groups := self.config.moe_router_num_groups:
            group_topk = self.config.moe_router_group_topk
            allowed = in_best_groups(
                selection, active, num_groups, group_topk, self.topk, self.settings.group_score
            )
            selection = selection.masked_fill(~allowed, -torch.inf)
            # If too few blocks are left, top-K takes unavailable ones, from any group.
            unavailable = None if unavailable is None else unavailable | ~allowed
        ids = self.topk(selection, active)
        return ids, None if unavailable is None else unavailable.gather(1, ids)

    def selection_scores(self, scores: Tensor) -> Tensor:
        """Scores `[T, B]` by which blocks are chosen: gates, if the expert bias is added."""
        return factors_of_all(str(self.settings.gate), scores) if self.balance.biased else scores
