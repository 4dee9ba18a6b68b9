"""Load balancing: auxiliary losses, an expert bias, prices; for every router that scores blocks.

Inputs: the scores `[T, B]` of a microbatch and the blocks that they chose. Outputs: the tokens of
the microbatch with the losses attached, so that the losses take part in the backward pass, and the
expert bias or the prices of the next choice.

With P_e the mean probability of block e and F_e its share of all choices, the losses are:

- `aux_loss`, `seq_aux_loss`, `global_aux_loss`: `B · Σ_e P_e F_e` (Fedus et al. 2021), with F over
  the microbatch, over each sequence, or over all microbatches of all data-parallel ranks since the
  step began (arXiv 2501.11873). The gradient passes through P only.
- `z_loss`: the mean squared log-sum-exp of the scores (ST-MoE, arXiv 2202.08906).
- `entropy_loss`: `Σ_e P_e log P_e`, with P over the tokens of all ranks (sigma-MoE,
  arXiv 2310.10837).

The expert bias is added to the scores for the choice only. After each step it moves against the
load by a fixed rate (arXiv 2408.15664); Megatron updates it. The prices of `quantile_balancing` are
subtracted from the scores; `quantile_balancing.py` has them.

Design notes:
- P is the softmax of the scores, whatever the gate is. A block's share of the sum of sigmoids could
  be balanced by making all scores small.
- Every loss is a mean over tokens, so a coefficient has the same meaning for every loss, microbatch
  size and number of ranks. (Megatron's global loss shrinks with data parallelism.)
- Megatron's metrics tracker gets the losses that Megatron prints, under Megatron's names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, override

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, z_loss_func
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_sffn.nn.quantile_balancing import QUANTILE_BALANCING, balancing_prices
from megatron_sffn.ops import device
from megatron_sffn.ops.counting import count_ids

BALANCE_LOSSES = {
    "aux_loss": "load_balancing_loss",
    "seq_aux_loss": "seq_load_balancing_loss",
    "global_aux_loss": "global_load_balancing_loss",
}
"""Value of `--moe-router-load-balancing-type` -> name of the loss in Megatron's logs."""


class LoadBalancing(torch.nn.Module):
    """The auxiliary losses, the expert bias and the prices of one router.

    Args:
        config: config of the model, with Megatron's flags of load balancing.
        pg_collection: Megatron's process groups; `tp_cp` and `tp_dp_cp` are used.
        entropy_coefficient: coefficient of the entropy loss.
    """

    expert_bias: Tensor
    local_tokens_per_expert: Tensor
    tokens_of_step: Tensor
    qb_beta: Tensor
    qb_beta_accum: Tensor
    qb_beta_count: Tensor

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        entropy_coefficient: float,
    ) -> None:
        super().__init__()
        self.config, self.num_blocks = config, config.num_moe_experts
        self.tp_cp_group, self.tp_dp_cp_group = pg_collection.tp_cp, pg_collection.tp_dp_cp
        self.weights = loss_weights(config, entropy_coefficient)
        self.layer_number: int | None = None
        self.values: dict[str, Tensor] = {}
        zeros = torch.zeros(self.num_blocks, dtype=torch.float32, device=device.current())
        # Megatron's `finalize_model_grads` looks for buffers of these names.
        if config.moe_router_enable_expert_bias:
            self.register_buffer("expert_bias", zeros.clone())
            self.register_buffer("local_tokens_per_expert", zeros.clone(), persistent=False)
        if "global_aux_loss" in self.weights:
            self.register_buffer("tokens_of_step", zeros.clone(), persistent=False)
        if config.moe_router_load_balancing_type == QUANTILE_BALANCING:
            self.register_buffer("qb_beta", zeros.clone())
            self.register_buffer("qb_beta_accum", zeros.clone(), persistent=False)
            self.register_buffer("qb_beta_count", zeros.new_zeros(()), persistent=False)

    @property
    def differentiates(self) -> bool:
        """True if a loss needs the gradient of the scores."""
        return bool(self.coefficients)

    @property
    def coefficients(self) -> Mapping[str, float | Tensor]:
        """Name of a loss that is on -> its coefficient."""
        return self.weights

    @property
    def biased(self) -> bool:
        """True if there is an expert bias."""
        return "expert_bias" in self._buffers

    @property
    def priced(self) -> bool:
        """True if blocks have prices, by quantile balancing."""
        return "qb_beta" in self._buffers

    def _maintain_float32_expert_bias(self) -> None:
        """Megatron's hook after it has cast a model to half precision: cast the buffers back.

        Token counts need more than the 8 bits of bfloat16, and so do the bias and the prices.
        """
        for name, buffer in self.named_buffers():
            setattr(self, name, buffer.float())

    def reset_global_aux_loss_tracker(self) -> None:
        """Megatron's hook at the end of a step."""
        if "tokens_of_step" in self._buffers:
            self.tokens_of_step.zero_()

    def take_values(self) -> dict[str, Tensor]:
        """This rank's losses, unweighted, summed over the microbatches since the last call.

        A loss of the model is their sum over tensor- and context-parallel ranks and their mean over
        data-parallel ranks.
        """
        values, self.values = self.values, {}
        return values

    @override
    def forward(self, x: Tensor, scores: Tensor, block_ids: Tensor, num_sequences: int) -> Tensor:
        """Count the choices, add up the prices and attach the losses, once per microbatch.

        Args:
            x: `[T, D]` tokens.
            scores: `[T, B]`.
            block_ids: `[T, K]`; negative for an empty place.
            num_sequences: number of sequences whose tokens alternate in T.

        Returns:
            x, with the losses attached for the backward pass.
        """
        # The first forward pass of a recomputed layer has no gradient, and must not count.
        if not (self.training and torch.is_grad_enabled()):
            return x
        if self.biased:
            self.local_tokens_per_expert += self._counts(block_ids, 1)[0]
        if self.priced:
            active, group = self.config.moe_router_topk, self.tp_cp_group
            self.qb_beta_accum += balancing_prices(scores.detach(), self.qb_beta, active, group)
            self.qb_beta_count += 1
        coefficients = self.coefficients
        if not coefficients:
            return x
        losses = self.losses(scores, block_ids, num_sequences)
        total = torch.stack([coefficients[kind] * loss for kind, loss in losses.items()]).sum()
        if self.config.calculate_per_token_loss:
            # Megatron then divides the gradients by the number of tokens of all ranks.
            total = total * len(x) * self.tp_cp_group.size()
        self._record(losses)
        attached: Tensor = MoEAuxLossAutoScaler.apply(x, total)
        return attached

    def losses(self, scores_TB: Tensor, ids_TK: Tensor, num_sequences: int) -> dict[str, Tensor]:
        """This rank's share of each unweighted loss; the shares sum over `tp_cp`."""
        losses = {}
        if "z_loss" in self.weights:
            losses["z_loss"] = z_loss_func(scores_TB, self.share)
        if self.weights.keys() == losses.keys():
            return losses
        probs_TB = scores_TB.softmax(dim=-1)
        for kind in BALANCE_LOSSES:
            if kind in self.weights:
                losses[kind] = self._balance_loss(kind, probs_TB, ids_TK, num_sequences)
        if "entropy_loss" in self.weights:
            losses["entropy_loss"] = self._entropy_loss(probs_TB)
        return losses

    @property
    def share(self) -> float:
        """This rank's share of a mean over the tokens of `tp_cp`, whose ranks have equally many."""
        return 1 / self.tp_cp_group.size()

    def _balance_loss(
        self, kind: str, probs_TB: Tensor, ids_TK: Tensor, num_sequences: int
    ) -> Tensor:
        """This rank's share of `B · Σ_e P_e F_e`; for `seq_aux_loss` of its mean over sequences."""
        num_sequences = num_sequences if kind == "seq_aux_loss" else 1
        counts = self._counts(ids_TK, num_sequences)
        sum_over(self.tp_cp_group, counts)
        if kind == "global_aux_loss":
            counts = self._counts_of_step(counts)
        frequencies = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
        mean_probs = probs_TB.view(-1, num_sequences, self.num_blocks).mean(dim=0) * self.share
        return self.num_blocks * (mean_probs * frequencies).sum() / num_sequences

    def _entropy_loss(self, probs_TB: Tensor) -> Tensor:
        """This rank's share of `Σ_e P_e log P_e`."""
        local_mean = probs_TB.mean(dim=0)
        sums = local_mean.detach().clone()
        sum_over(self.tp_dp_cp_group, sums)
        # The value is that of the mean over all ranks, the gradient that of this rank's mean.
        mean = sums / self.tp_dp_cp_group.size() + (local_mean - local_mean.detach())
        # Clamped, because the derivative of the logarithm is infinite at zero.
        smallest = torch.finfo(mean.dtype).tiny
        return (mean * mean.clamp(min=smallest).log()).sum() * self.share

    def _counts(self, ids_TK: Tensor, num_sequences: int) -> Tensor:
        """`[num_sequences, B]` fp32: how often the tokens of each sequence choose each block."""
        sequence_T = torch.arange(len(ids_TK), device=ids_TK.device) % num_sequences
        # One histogram for all sequences, in which each has a range of B ids.
        shifted_ids = (ids_TK + self.num_blocks * sequence_T[:, None]).where(ids_TK >= 0, -1)
        counts = count_ids(shifted_ids, num_sequences * self.num_blocks)[1:]
        return counts.view(num_sequences, self.num_blocks).float()

    def _counts_of_step(self, counts: Tensor) -> Tensor:
        """`[1, B]`: choices of all ranks in this microbatch and in those before it in the step."""
        # The ranks of `tp_cp` have equal counts already, so this sum counts a choice several times;
        # only ratios of counts matter.
        global_counts = counts.clone()
        sum_over(self.tp_dp_cp_group, global_counts)
        self.tokens_of_step += global_counts[0]
        return self.tokens_of_step[None].clone()

    def _record(self, losses: dict[str, Tensor]) -> None:
        """Record the losses for Megatron's log and for `take_values`."""
        for kind, loss in losses.items():
            value, name = loss.detach(), BALANCE_LOSSES.get(kind, kind)
            self.values[name] = self.values.get(name, torch.zeros_like(value)) + value
            if kind in BALANCE_LOSSES or kind == "z_loss":
                assert self.layer_number is not None, "Megatron numbers the layers"
                get_moe_metrics_tracker().record(
                    name,
                    value,
                    *self.config.logged_layer(self.layer_number),
                    reduce_group=self.tp_cp_group,
                )


def loss_weights(config: TransformerConfig, entropy_coefficient: float) -> dict[str, float]:
    """Coefficients of the losses, without those that are 0.

    Args:
        config: with Megatron's flags of load balancing: one type and coefficient, or lists of them.
        entropy_coefficient: coefficient of the entropy loss.
    """
    kinds, coefficients = config.moe_router_load_balancing_type, config.moe_aux_loss_coeff
    if isinstance(kinds, str):
        kinds = [kinds]
    if not isinstance(coefficients, list):
        coefficients = [coefficients] * len(kinds)
    weights = dict(zip(kinds, coefficients, strict=True))
    weights |= {"z_loss": config.moe_z_loss_coeff or 0.0, "entropy_loss": entropy_coefficient}
    known = (*BALANCE_LOSSES, "z_loss", "entropy_loss")
    return {kind: weight for kind, weight in weights.items() if kind in known and weight}


def losses_reach_scores(config: TransformerConfig, entropy_coefficient: float) -> bool:
    """True if an auxiliary loss has a gradient in the scores; False if nothing can be unbalanced.

    Args:
        config: as for `loss_weights`, with the B blocks and K active blocks of a layer.
        entropy_coefficient: coefficient of the entropy loss.
    """
    weights, num_blocks = loss_weights(config, entropy_coefficient), config.num_moe_experts
    if "z_loss" in weights:
        return True
    if num_blocks == 1:
        return False  # the probability of the only block is always 1
    # If every token has all B blocks, then F_e = 1 / B and Σ P_e F_e = 1 / B for every P.
    return "entropy_loss" in weights or (bool(weights) and config.moe_router_topk < num_blocks)


def sum_over(group: Any, tensor: Tensor) -> None:
    """All-reduce a tensor in place."""
    if group.size() > 1:
        torch.distributed.all_reduce(tensor, group=group)
