"""Switch: a learned gate, softmax over all blocks (Fedus et al. 2021), after Megatron's own router.

`p = softmax(x W_gᵀ)` in fp32; the K blocks of largest p compute, and p (over all B, not
renormalised over the chosen) multiplies their output, which is how the gate learns. Gate weights,
z-loss and the logging of the balance loss are Megatron's `TopKRouter`; ours are the index form of
the selection and of the loss's counts, so that no tokens × blocks map is made.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.moe.moe_utils import (
    switch_load_balancing_loss_func,
    topk_routing_with_score_function,
)
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_sffn.config import RouterConfig, SparseFFNConfig
from megatron_sffn.ops.route_topk import route_topk
from megatron_sffn.routers.base import Routing


@dataclass(frozen=True, kw_only=True)
class SwitchConfig(RouterConfig):
    """Settings of Switch: Megatron's flags are enough."""

    name = "switch"
    summary = "learned softmax gate that multiplies the output, with a load-balance loss"
    balance_coefficient = 0.01  # Fedus et al. 2021; --moe-aux-loss-coeff overrides it

    @property
    def gated_output(self) -> bool:
        """See `RouterConfig.gated_output`."""
        return True

    def build(self) -> type[SwitchRouter]:
        """See `RouterConfig.build`."""
        return SwitchRouter

    def parameters(self, sffn: SparseFFNConfig, hidden_size: int) -> int:
        """The gate's weights."""
        return sffn.num_blocks * hidden_size

    def flops(self, sffn: SparseFFNConfig, hidden_size: int, *, gated: bool) -> int:
        """One dot product per block."""
        return 2 * hidden_size * sffn.num_blocks


class SwitchRouter(TopKRouter):
    """Megatron's top-k router in index form.

    With `--moe-router-enable-expert-bias` a bias per block, which Megatron updates after each step
    by the sign of its load's distance from the mean, is added to p for the selection alone.
    """

    def forward(self, x: Tensor, keys: Tensor, token_ids: Tensor | None = None) -> Routing:
        """See `Router.forward`."""
        self._maintain_float32_expert_bias()
        logits = self.apply_z_loss(self.gating(self.apply_input_jitter(x)))
        ids = route_topk(self._selection_scores(logits.detach()), self.topk)
        gates, _ = topk_routing_with_score_function(
            logits, self.topk, use_pre_softmax=True, precomputed_indices=ids, dense_output=True
        )
        # Not in the first pass of a recomputed layer, which has no gradient: once per microbatch.
        if self.training and torch.is_grad_enabled():
            counts = torch.bincount(ids.flatten(), minlength=logits.shape[1])
            gates = self._balanced(gates, logits, counts)
            if self.enable_expert_bias:
                self.local_tokens_per_expert += counts
        return Routing(block_ids=ids, gates=gates)

    def _selection_scores(self, logits: Tensor) -> Tensor:
        """What the blocks are chosen by; the bias stays out of the gate (arXiv 2408.15664)."""
        if not self.enable_expert_bias:
            return logits
        return logits.softmax(dim=-1) + self.expert_bias

    def _balanced(self, gates: Tensor, logits: Tensor, counts: Tensor) -> Tensor:
        """Attach the balance loss `B · Σ_e P_e F_e`; its gradient passes through P alone."""
        coefficient = self.get_aux_loss_coeff("aux_loss")
        if coefficient == 0:
            return gates
        loss = switch_load_balancing_loss_func(
            probs=logits.softmax(dim=-1),
            tokens_per_expert=reduce_from_tensor_model_parallel_region(counts, self.tp_cp_group),
            total_num_tokens=len(logits) * self.tp_cp_group.size(),
            topk=self.topk,
            num_experts=len(counts),
            moe_aux_loss_coeff=coefficient,
        )
        return self.attach_and_log_load_balancing_loss(
            gates, coefficient, loss, "load_balancing_loss", self.tp_cp_group
        )
