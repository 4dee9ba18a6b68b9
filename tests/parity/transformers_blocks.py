"""The sparse blocks of Hugging Face's transformers, with the weights of our layers.

All blocks compute probabilities in fp32 whatever the dtype is, so that float64 layers agree to
fp32's precision.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.parity.compare import outcome
from tests.support.router_cases import Case, D, build

FP32 = 2e-6
"""Relative tolerance of a float64 layer with probabilities in fp32."""

SIZES = {
    "hidden_size": D,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 16,
    "num_experts_per_tok": 4,
    "hidden_act": "silu",
}
"""Fields of their configs; our layer has 12 blocks of 4 cells, 4 of them active."""


def sparse_layer(gate: str, balance: float = 0.0) -> Any:
    """Our layer with Switch's gate network and SwiGLU blocks."""
    kind = "aux_loss" if balance else "none"
    losses = (("moe_router_load_balancing_type", kind), ("moe_aux_loss_coeff", balance))
    return build(Case(router="switch", swiglu=True, options=(("gate", gate),), megatron=losses))


def with_weights_of(layer: Any, block: Any) -> Any:
    """Their block in float64 with our weights; the second matrix of an expert is `[D, G]`."""
    block = block.double()
    weights = {
        "gate.weight": layer.router.weight,
        "experts.gate_up_proj": layer.experts.keys,
        "experts.down_proj": layer.experts.values.transpose(1, 2),
    }
    block.load_state_dict({name: weight.detach().clone() for name, weight in weights.items()})
    return block


def block_outcome(block: Any, loss: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
    """`outcome` of a block of transformers, whose inputs have the batch first.

    Args:
        block: from `with_weights_of`.
        loss: a function of the router's logits `[T, B]`, added to the other loss.
    """

    def forward(x: Tensor) -> Tensor:
        batch_first = x.transpose(0, 1).contiguous()
        if loss is not None:
            logits, *_ = block.gate(batch_first)
            loss(logits).backward(retain_graph=True)
        y: Tensor = block(batch_first)
        return y.transpose(0, 1)

    def gradients() -> dict[str, Tensor | None]:
        return {
            "keys": block.experts.gate_up_proj.grad,
            "values": block.experts.down_proj.grad.transpose(1, 2),
            "weight": block.gate.weight.grad,
        }

    return outcome(forward, gradients)


def eager(config: Any) -> Any:
    """A config with the experts of its modelling file, not a fused kernel."""
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    return config
