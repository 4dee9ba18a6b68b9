"""Measures the bytes of weights, gradients and optimizer state that a rank of a run holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class RankBytes:
    """What a rank holds after training.

    Args:
        weights: bytes of the parameters.
        gradients: bytes of Megatron's gradient buffers.
        optimizer: bytes of the moments, and of the master weights of a model in half precision.
    """

    weights: int
    gradients: int
    optimizer: int


def state_bytes(optimizer: Any, half: bool) -> int:
    """Bytes of an optimizer's moments, and of its master weights if the model is half precision."""
    inner = optimizer.optimizer
    tensors = [
        value
        for state in inner.state.values()
        for name, value in state.items()
        if name.startswith("exp_avg") or name == "momentum_buffer"
    ]
    if half:
        tensors += [weight for group in inner.param_groups for weight in group["params"]]
    return sum(tensor.nbytes for tensor in tensors)


def bytes_of_rank(chunks: Sequence[Any], optimizer: Any, half: bool) -> RankBytes:
    """Bytes of a model's chunks on this rank, and of their optimizer."""
    weights = [parameter for chunk in chunks for parameter in chunk.parameters()]
    return RankBytes(
        weights=sum(parameter.nbytes for parameter in weights),
        gradients=sum(parameter.main_grad.nbytes for parameter in weights),
        optimizer=sum(state_bytes(inner, half) for inner in optimizer.chained_optimizers),
    )
