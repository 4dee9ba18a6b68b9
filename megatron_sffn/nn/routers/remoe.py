"""ReMoE: ReLU routing with a variable number of blocks (Wang et al. 2024, arXiv 2412.14711).

The gate of a block is `relu(x W_gᵀ)`, and blocks whose gate is 0 do not compute: choosing is
continuous, since a block enters and leaves with gate 0. An L1 loss steers how many gates are
positive: `λ · B Σ_e P_e F_e`, with P_e the mean gate of block e and F_e the share of tokens for
which it is positive, over the target. F weighs busy blocks more, which balances them. After each
step λ is multiplied by α if the tokens have more positive gates in the mean than the target, and
divided by α if they have fewer (λ starts at 1e-8, α = 1.2).

Ours: a token has at most K blocks, those of the K largest positive gates; the target is K/2 unless
`--sffn-target-blocks` sets it, and with K = B there is no bound, as in the paper. The loss and λ
count all positive gates, also those beyond the bound. Each layer steers its own λ; the paper has
one λ and the mean over layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, override

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_sffn.nn.config import SparseFFNConfig, flag
from megatron_sffn.nn.load_balancing import LoadBalancing, sum_over
from megatron_sffn.nn.router_config import RouterTestNumbers
from megatron_sffn.nn.routers.learned import LearnedConfig, LearnedRouter
from megatron_sffn.nn.saved_bytes import FP32, INT64, LayerCall, SavedBytes
from megatron_sffn.nn.transformer_config import SparseFFNTransformerConfig
from megatron_sffn.ops import device
from megatron_sffn.utils.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ReMoEConfig(LearnedConfig):
    """Settings of ReMoE."""

    name = "remoe"
    summary = "learned ReLU gate; blocks of gate 0 do not compute, an L1 loss steers their number"
    default_gate = "relu"
    # Without the loss, whose load is that of a microbatch, tokens are independent.
    test_numbers = RouterTestNumbers(options={"l1_coefficient": 0.0})

    l1_coefficient: float = flag(
        "--sffn-l1-coeff",
        default=1e-8,
        least=0.0,
        training_only=True,
        help="λ, first coefficient of the L1 loss of the gates; 0 for no loss (remoe)",
    )
    l1_multiplier: float = flag(
        "--sffn-l1-multiplier",
        default=1.2,
        least=1.0,
        training_only=True,
        help="α, factor by which λ moves in a step towards the target (remoe)",
    )
    target: float | None = flag(
        "--sffn-target-blocks",
        default=None,
        kind=float,
        least=0.0,
        training_only=True,
        help="positive gates of a token in the mean, to which λ steers (remoe; default: half of "
        "the K = k/g blocks that a token can have)",
    )

    def target_blocks(self, sffn: SparseFFNConfig) -> float:
        """The mean number of positive gates to which λ steers."""
        return sffn.num_active_blocks / 2 if self.target is None else self.target

    @override
    def check(self, sffn: SparseFFNConfig) -> None:
        super().check(sffn)
        active = sffn.num_active_blocks
        if self.gate != self.default_gate:
            raise ConfigError(
                f"--sffn-gate {self.gate} is not that of --sffn-router remoe, which leaves out "
                "blocks whose ReLU is 0; leave it out, or use --sffn-router switch"
            )
        if self.target is None:
            return
        if not self.l1_coefficient:
            raise ConfigError(
                f"--sffn-target-blocks {self.target:g} has nothing to act on with --sffn-l1-coeff "
                "0; leave one out"
            )
        if not 0 < self.target <= active:
            raise ConfigError(
                f"--sffn-target-blocks {self.target:g} is not above 0 and at most the {active} "
                "blocks that a token can have; give a number between them, or a larger "
                "--sffn-active-cells"
            )

    @override
    def router_class(self) -> type[ReMoERouter]:
        return ReMoERouter

    @override
    def saved_bytes(self, call: LayerCall) -> SavedBytes:
        base, sffn = super().saved_bytes(call), call.sffn
        # Which slots are not empty: all of them, if each token has K positive gates.
        bytes_ = base.bytes + call.tokens * sffn.num_active_blocks * INT64
        if self.l1_coefficient:
            # All gates, the load of the blocks, the coefficient, and the sum of all losses.
            scalars = 1 + (not self._losses(call))
            bytes_ += FP32 * (call.tokens * sffn.num_blocks + sffn.num_blocks + scalars)
        return replace(base, bytes=bytes_)


class ReMoERouter(LearnedRouter):
    """A learned ReLU gate. Arguments as `Router`."""

    settings: ReMoEConfig
    balance: GateSparsity

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.balance = GateSparsity(self.config, arguments["pg_collection"])

    @override
    @torch.no_grad()
    def choose(self, scores: Tensor) -> tuple[Tensor, Tensor | None]:
        ids, dropped = super().choose(scores)
        is_off = scores.gather(1, ids) <= 0
        return ids, is_off if dropped is None else is_off | dropped

    @override
    def end_step(self) -> None:
        self.balance.end_step()


class GateSparsity(LoadBalancing):
    """Load balancing with an L1 loss of the gates, whose coefficient moves after each step.

    Args:
        config: config of the model, with a ReMoE router.
        pg_collection: Megatron's process groups; `tp_cp` and `tp_dp_cp` are used.
    """

    l1_coefficient: Tensor
    gates_and_tokens: Tensor
    """Positive gates, and tokens, of this rank since the step began."""

    def __init__(
        self, config: SparseFFNTransformerConfig, pg_collection: ProcessGroupCollection
    ) -> None:
        assert config.sffn is not None and isinstance(config.sffn.router, ReMoEConfig)
        self.settings = config.sffn.router
        super().__init__(config, pg_collection, self.settings.entropy_coefficient)
        self.target = self.settings.target_blocks(config.sffn)
        if self.settings.l1_coefficient:
            first = torch.tensor([self.settings.l1_coefficient], device=device.current())
            self.register_buffer("l1_coefficient", first)
            self.register_buffer("gates_and_tokens", first.new_zeros(2), persistent=False)

    @property
    @override
    def coefficients(self) -> Mapping[str, float | Tensor]:
        if "l1_coefficient" not in self._buffers:
            return self.weights
        return {**self.weights, "l1_loss": self.l1_coefficient[0]}

    @override
    def losses(self, scores_TB: Tensor, ids_TK: Tensor, num_sequences: int) -> dict[str, Tensor]:
        losses = super().losses(scores_TB, ids_TK, num_sequences)
        if "l1_coefficient" in self._buffers:
            losses["l1_loss"] = self._l1_loss(scores_TB)
        return losses

    def _l1_loss(self, scores_TB: Tensor) -> Tensor:
        """This rank's share of `B · Σ_e P_e F_e`; it counts the positive gates of the step."""
        gates_TB = scores_TB.relu()
        counts = (gates_TB > 0).sum(dim=0).float()
        self.gates_and_tokens += torch.stack((counts.sum(), counts.new_tensor(len(scores_TB))))
        sum_over(self.tp_cp_group, counts)
        loads = counts / (len(scores_TB) * self.tp_cp_group.size() * self.target)
        mean_gates = gates_TB.mean(dim=0) * self.share
        return self.num_blocks * (mean_gates * loads).sum()

    @torch.no_grad()
    def end_step(self) -> None:
        """Move the coefficient, by the tokens of all ranks; a step without tokens keeps it."""
        if "l1_coefficient" not in self._buffers:
            return
        sum_over(self.tp_dp_cp_group, self.gates_and_tokens)
        gates, tokens = self.gates_and_tokens
        direction = (gates - self.target * tokens).sign()
        self.l1_coefficient *= self.settings.l1_multiplier**direction
        self.gates_and_tokens.zero_()
