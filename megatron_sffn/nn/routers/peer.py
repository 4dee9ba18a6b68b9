"""PEER: product keys choose blocks that compute with keys of their own (He 2024, arXiv 2407.04153).

Each head has a query of its own and chooses K / heads of B = n² blocks by product keys; the softmax
over a head's chosen scores is the gate of its blocks, and the heads are summed:
`y = Σ_heads Σ_b gate_b · f(x K_bᵀ) V_b`. The paper has blocks of one cell, up to a million of them;
other block sizes and other gates are ours.

Queries, sub-keys and their initial values are those of PKM (our reading). The paper's batch norm of
the queries is left out, as it is in `pkm.py` and for the same reason.

Design notes: several heads can choose the same block for a token. Its output does not depend on the
head, so the block computes once, with the sum of the heads' gates, and the other slots stay empty.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, override

import torch
from torch import Tensor

from megatron_sffn.nn.config import SparseFFNConfig
from megatron_sffn.nn.router_config import RouterTestNumbers
from megatron_sffn.nn.routers.base import NO_BLOCK, Routing
from megatron_sffn.nn.routers.gates import gate_flag, gates_of_chosen, is_normalized
from megatron_sffn.nn.routers.pkm import PKMConfig, PKMRouter
from megatron_sffn.nn.saved_bytes import FP32, INT64, LayerCall, SavedBytes
from megatron_sffn.nn.transformer_config import SparseFFNTransformerConfig
from megatron_sffn.utils.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PeerConfig(PKMConfig):
    """Settings of PEER."""

    name = "peer"
    summary = "product keys choose blocks of any size; softmax over each head's scores as the gate"
    initialization = "megatron"
    values_alone: ClassVar[bool] = False
    test_numbers = RouterTestNumbers(
        options={"heads": 1, "key_size": 10},
        square_blocks=True,
        flags="--sffn-product-key-size 16 --sffn-pkm-heads 2",
        paper_flags="--sffn-pkm-heads 2",
    )

    default_gate: ClassVar[str] = "softmax-chosen"

    gate: str | None = gate_flag()

    def __post_init__(self) -> None:
        """Fill in the default gate, then check all fields."""
        object.__setattr__(self, "gate", self.gate or self.default_gate)
        super().__post_init__()

    @override
    def check(self, sffn: SparseFFNConfig) -> None:
        super().check(sffn)
        if self.gate == "softmax":
            raise ConfigError(
                "--sffn-gate softmax needs the scores of all blocks, and --sffn-router peer has "
                "only those of the best; use --sffn-gate softmax-chosen"
            )

    @override
    def untrained(self, config: SparseFFNTransformerConfig) -> str | None:
        assert config.sffn is not None, "a router is checked in a model that has it"
        if self.gate == "none":
            return (
                "with --sffn-gate none no gradient passes through the choice; use --sffn-gate "
                "softmax-chosen or sigmoid"
            )
        if not is_normalized(str(self.gate)) or config.sffn.num_active_blocks > self.heads:
            return None
        return (
            f"each of --sffn-pkm-heads {self.heads} heads chooses one block, and --sffn-gate "
            f"{self.gate} is always 1 for one chosen block; use fewer heads, a smaller "
            "--sffn-block-size, or --sffn-gate sigmoid"
        )

    @override
    @property
    def splitting_divides_gates(self) -> bool:
        return is_normalized(str(self.gate))

    @override
    def router_class(self) -> type[PeerRouter]:
        return PeerRouter

    @override
    def saved_bytes(self, call: LayerCall) -> SavedBytes:
        active, gate, per_token = call.sffn.num_active_blocks, str(self.gate), 0
        if gate.startswith("sqrt-softplus"):
            per_token += FP32 * active  # the scores beside the function of them
        is_divided = is_normalized(gate) and gate != "softmax-chosen"
        if is_divided:
            per_token += FP32 * self.heads
        if self.heads > 1:
            # The order of the ids, the slot of each, the gates where they were divided, and the
            # slots that are not empty: all of them, if no two heads choose the same block.
            per_token += active * (3 * INT64 + (FP32 if is_divided else 0))
        base = super().saved_bytes(call)
        return replace(base, bytes=base.bytes + call.tokens * per_token)


class PeerRouter(PKMRouter):
    """Product keys with a gate for each chosen block. Arguments as `Router`."""

    settings: PeerConfig

    @override
    def coefficients(self, scores: Tensor) -> Tensor:
        return gates_of_chosen(str(self.settings.gate), scores)

    @override
    def forward(self, x: Tensor, *arguments: Any, **options: Any) -> Routing:
        routing = super().forward(x, *arguments, **options)
        return routing if self.settings.heads == 1 else one_slot_per_block(routing)


def one_slot_per_block(routing: Routing) -> Routing:
    """The same routing with distinct blocks in each row: one slot has the sum of a block's gates.

    Args:
        routing: with gates and scores, and without empty slots.

    Returns:
        Each row in ascending order of its blocks, then empty slots. The score of a block is the
        largest of its scores.
    """
    assert routing.gates is not None and routing.scores is not None
    ids_TK, order_TK = routing.block_ids.sort(dim=1, stable=True)
    is_first = torch.ones_like(ids_TK, dtype=torch.bool)
    is_first[:, 1:] = ids_TK[:, 1:] != ids_TK[:, :-1]
    slots_TK = is_first.cumsum(dim=1) - 1
    gates_TK = routing.gates.gather(1, order_TK)
    scores_TK = routing.scores.gather(1, order_TK)
    return replace(
        routing,
        block_ids=torch.full_like(ids_TK, NO_BLOCK).scatter(1, slots_TK, ids_TK),
        gates=torch.zeros_like(gates_TK).scatter_add(1, slots_TK, gates_TK),
        scores=torch.zeros_like(scores_TK).scatter_reduce(
            1, slots_TK, scores_TK, "amax", include_self=False
        ),
        may_be_empty=True,
    )
