"""Records for counting the bytes that a sparse layer keeps for the backward pass.

Inputs: the sizes of one call of a sparse layer (`LayerCall`). Outputs: bytes (`SavedBytes`). Each
router's config has the formula for its own tensors (`RouterConfig.saved_bytes`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_sffn.ops import Activation

if TYPE_CHECKING:
    from megatron_sffn.nn.config import SparseFFNConfig
    from megatron_sffn.nn.parallel_layout import ParallelLayout

FP32, INT32, INT64 = 4, 4, 8
"""Bytes of a number. Scores are in fp32 whatever the dtype of the model is."""


@dataclass(frozen=True, kw_only=True)
class LayerCall:
    """One call of a sparse layer on one rank.

    Args:
        sffn: the layer.
        hidden_size: D.
        tokens: T.
        layout: layout of the run.
        activation: name of the activation function.
        losses: Megatron's load-balancing losses that are on.
        clamp: True if the inputs of the activation function are clamped.
        offset: True if its linear half has an offset.
        cuda: True if the call runs on a GPU, which changes the kept operands of the scores and the
            backend that `auto` chooses.
    """

    sffn: SparseFFNConfig
    hidden_size: int
    tokens: int
    layout: ParallelLayout
    activation: str
    losses: frozenset[str]
    clamp: bool = False
    offset: bool = False
    cuda: bool = False

    @property
    def upcasts_operands(self) -> bool:
        """True if scores keep fp32 copies of half-precision operands, as they do on a CPU."""
        return self.layout.half_precision and not self.cuda

    @property
    def keys_per_cell(self) -> int:
        """Keys of a cell: two for a gated activation."""
        return Activation(self.activation).keys_per_cell


@dataclass(frozen=True, kw_only=True)
class SavedBytes:
    """The bytes that are kept for the backward pass.

    Args:
        bytes: bytes of its own tensors.
        tokens: True if the layer's input `[T, D]` stays too; the layer counts it once.
    """

    bytes: int = 0
    tokens: bool = False
