"""Keeping blocks evenly used: losses and a bias, for every router that has scores of blocks.

Enters: scores `[T, B]` of a microbatch and the blocks chosen by them. Leaves: its tokens with the
losses attached, so that their gradients join the backward, and the bias for the next choice.

With P_e the mean probability of block e and F_e its share of the choices:

- `aux_loss`, `seq_aux_loss`, `global_aux_loss`: `B · Σ_e P_e F_e` (Fedus et al. 2021), F over the
  microbatch, over each sequence, or over the microbatches of all data-parallel ranks since the step
  began (arXiv 2501.11873). The gradient passes through P alone.
- `z_loss`: the mean squared log-sum-exp of the scores (ST-MoE, arXiv 2202.08906).
- `entropy_loss`: `Σ_e P_e log P_e`, P over the tokens of all ranks (sigma-MoE, arXiv 2310.10837).
- the bias, added to the scores for the choice alone, moves against the load by a fixed rate after
  each step (arXiv 2408.15664); the update is Megatron's.

Choices
- P is the softmax of the scores whatever the gate is: a sigmoid's share of the sum could be had by
  making all scores small.
- Every loss is a mean over tokens, so that a coefficient means the same for each of them, for any
  microbatch and any number of ranks. (Megatron's global loss shrinks with data parallelism.)
- Megatron's tracker gets the losses that it prints; the names are its own.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, z_loss_func
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_sffn.ops import device
from megatron_sffn.ops.counting import count_ids

BALANCE_LOSSES = {
    "aux_loss": "load_balancing_loss",
    "seq_aux_loss": "seq_load_balancing_loss",
    "global_aux_loss": "global_load_balancing_loss",
}
"""Value of `--moe-router-load-balancing-type` -> Megatron's name of the loss in its logs."""


class LoadBalancing(torch.nn.Module):
    """The losses and the bias of one router.

    Args:
        config: of the model; Megatron's flags of balance are read from it.
        pg_collection: Megatron's process groups; `tp_cp` and `tp_dp_cp` are used.
        entropy_coefficient: weight of the entropy loss.
    """

    expert_bias: Tensor
    local_tokens_per_expert: Tensor
    tokens_of_step: Tensor

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        entropy_coefficient: float,
    ) -> None:
        super().__init__()
        self.config, self.num_blocks = config, config.num_moe_experts
        self.tp_cp_group, self.tp_dp_cp_group = pg_collection.tp_cp, pg_collection.tp_dp_cp
        self.weights = balance_weights(config, entropy_coefficient)
        self.layer_number: int | None = None
        self.values: dict[str, Tensor] = {}
        zeros = torch.zeros(self.num_blocks, dtype=torch.float32, device=device.current())
        # Names that Megatron's `finalize_model_grads` looks for.
        if config.moe_router_enable_expert_bias:
            self.register_buffer("expert_bias", zeros.clone())
            self.register_buffer("local_tokens_per_expert", zeros.clone(), persistent=False)
        if "global_aux_loss" in self.weights:
            self.register_buffer("tokens_of_step", zeros.clone(), persistent=False)

    @property
    def differentiates(self) -> bool:
        """Whether the scores need a gradient."""
        return bool(self.weights)

    @property
    def biased(self) -> bool:
        """Whether there is a bias."""
        return "expert_bias" in self._buffers

    def _maintain_float32_expert_bias(self) -> None:
        """Megatron's hook: half-precision models have their buffers narrowed, these not.

        Counts of tokens need more than 8 bits as well.
        """
        for name, buffer in self.named_buffers():
            setattr(self, name, buffer.float())

    def reset_global_aux_loss_tracker(self) -> None:
        """Megatron's hook: a step ends."""
        if "tokens_of_step" in self._buffers:
            self.tokens_of_step.zero_()

    def take_values(self) -> dict[str, Tensor]:
        """This rank's summed losses of microbatches since the last call, unweighted.

        They sum over tensor- and context-parallel ranks, and are averaged over data-parallel ones.
        """
        taken, self.values = self.values, {}
        return taken

    def forward(self, x: Tensor, scores: Tensor, block_ids: Tensor, num_sequences: int) -> Tensor:
        """Count the choices and attach the losses, once per microbatch.

        Args:
            x: `[T, D]` tokens.
            scores: `[T, B]`.
            block_ids: `[T, K]`; negative for none.
            num_sequences: whose tokens alternate in T.

        Returns:
            x, as it is.
        """
        # The first pass of a recomputed layer has no gradient.
        if not (self.training and torch.is_grad_enabled()):
            return x
        if self.biased:
            self.local_tokens_per_expert += self._counts(block_ids, 1)[0]
        if not self.weights:
            return x
        losses = self._losses(scores, block_ids, num_sequences)
        total = torch.stack([self.weights[kind] * loss for kind, loss in losses.items()]).sum()
        if self.config.calculate_per_token_loss:
            # Gradients are then divided by the tokens of all ranks.
            total = total * len(x) * self.tp_cp_group.size()
        self._record(losses)
        attached: Tensor = MoEAuxLossAutoScaler.apply(x, total)
        return attached

    def _losses(self, scores: Tensor, block_ids: Tensor, num_sequences: int) -> dict[str, Tensor]:
        """This rank's part of each unweighted loss: they sum over `tp_cp`."""
        losses, share = {}, 1 / self.tp_cp_group.size()
        if "z_loss" in self.weights:
            losses["z_loss"] = z_loss_func(scores, share)
        if self.weights.keys() == losses.keys():
            return losses
        # [T, B], of which every loss takes a mean.
        probabilities = scores.softmax(dim=-1)
        for kind in (kind for kind in BALANCE_LOSSES if kind in self.weights):
            sequences = num_sequences if kind == "seq_aux_loss" else 1
            chosen = self._counts(block_ids, sequences)
            _sum_over(self.tp_cp_group, chosen)
            if kind == "global_aux_loss":
                chosen = self._since_the_step_began(chosen)
            frequencies = chosen / chosen.sum(dim=1, keepdim=True).clamp(min=1)
            mean = probabilities.view(-1, sequences, self.num_blocks).mean(dim=0) * share
            losses[kind] = self.num_blocks * (mean * frequencies).sum() / sequences
        if "entropy_loss" in self.weights:
            mean = probabilities.mean(dim=0)
            everywhere = mean.detach().clone()
            _sum_over(self.tp_dp_cp_group, everywhere)
            # The value of all ranks' mean, with the gradient of this rank's.
            mean = everywhere / self.tp_dp_cp_group.size() + (mean - mean.detach())
            # Not zero in the logarithm, whose derivative would be infinite there.
            least = torch.finfo(mean.dtype).tiny
            losses["entropy_loss"] = (mean * mean.clamp(min=least).log()).sum() * share
        return losses

    def _counts(self, block_ids: Tensor, num_sequences: int) -> Tensor:
        """`[num_sequences, B]` how often each block is chosen for the tokens of each sequence."""
        sequence = torch.arange(len(block_ids), device=block_ids.device) % num_sequences
        places = (block_ids + self.num_blocks * sequence[:, None]).where(block_ids >= 0, -1)
        counts = count_ids(places, num_sequences * self.num_blocks)[1:]
        return counts.view(num_sequences, self.num_blocks).float()

    def _since_the_step_began(self, chosen: Tensor) -> Tensor:
        """`[1, B]` choices of this microbatch on all ranks, and of those before it."""
        # Ranks of `tp_cp` have the same sum already; only ratios matter.
        everywhere = chosen.clone()
        _sum_over(self.tp_dp_cp_group, everywhere)
        self.tokens_of_step += everywhere[0]
        return self.tokens_of_step[None].clone()

    def _record(self, losses: dict[str, Tensor]) -> None:
        """Note the losses, for Megatron's log and ours."""
        for kind, loss in losses.items():
            value, name = loss.detach(), BALANCE_LOSSES.get(kind, kind)
            self.values[name] = self.values.get(name, torch.zeros_like(value)) + value
            if kind != "entropy_loss":
                get_moe_metrics_tracker().record(
                    name,
                    value,
                    self.layer_number,
                    self.config.num_layers,
                    reduce_group=self.tp_cp_group,
                )


def balance_weights(config: TransformerConfig, entropy_coefficient: float) -> dict[str, float]:
    """Loss -> weight, of those that are not 0.

    Args:
        config: with Megatron's flags of balance, which hold one or a list of types and weights.
        entropy_coefficient: of the entropy loss.
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
    """True if a balance loss has a gradient in the scores: not if there is nothing to balance.

    Args:
        config: as for `balance_weights`, with the B blocks and K active ones of a layer.
        entropy_coefficient: of the entropy loss.
    """
    weights, num_blocks = balance_weights(config, entropy_coefficient), config.num_moe_experts
    if "z_loss" in weights:
        return True
    if num_blocks == 1:
        return False  # its probability is always 1
    # Where every token has all B blocks, F is even, and Σ P_e F_e = 1 / B whatever P is.
    return "entropy_loss" in weights or (bool(weights) and config.moe_router_topk < num_blocks)


def _sum_over(group: Any, tensor: Tensor) -> None:
    """Replace a tensor by its sum over the ranks of a group."""
    if group.size() > 1:
        torch.distributed.all_reduce(tensor, group=group)
