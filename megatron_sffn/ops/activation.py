"""The nonlinearity of a memory cell, and its derivative for the hand-written backward passes.

Inputs: up projections `[..., G]`, or `[..., 2G]` (gate half first) if gated, which is the layout
of Megatron's fused first linear layer. Outputs: coefficients of the values, `[..., G]`.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_sffn.utils.errors import ConfigError

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

QUICK = 1.702
"""Factor with which `u · σ(1.702 u)` approximates GELU (arXiv 1606.08415), as in Megatron."""


class Activation(StrEnum):
    """The function f of `f(x Kᵀ) V`."""

    GELU = "gelu"
    RELU = "relu"
    SQUARED_RELU = "squared_relu"
    SWIGLU = "swiglu"
    QUICK_GEGLU = "quick_geglu"

    @property
    def gated(self) -> bool:
        """True if a cell has two keys, one of which is a gate."""
        return self in (Activation.SWIGLU, Activation.QUICK_GEGLU)

    @property
    def keys_per_cell(self) -> int:
        """Keys per cell: 2 with a gate key, else 1."""
        return 2 if self.gated else 1

    @classmethod
    def of(cls, config: TransformerConfig) -> Activation:
        """The activation that Megatron's flags name.

        Raises:
            ConfigError: if a sparse layer does not implement it.
        """
        name = getattr(config.activation_func, "__name__", str(config.activation_func))
        known = {
            ("gelu", False): cls.GELU,
            ("relu", False): cls.RELU,
            ("squared_relu", False): cls.SQUARED_RELU,
            ("silu", True): cls.SWIGLU,
            ("quick_gelu", True): cls.QUICK_GEGLU,
        }
        try:
            return known[name, bool(config.gated_linear_unit)]
        except KeyError:
            gated = "gated " if config.gated_linear_unit else ""
            raise ConfigError(
                f"activation {gated}{name} is not one of a sparse layer's; use GELU (the default), "
                "--sffn-relu, --squared-relu, --swiglu or --quick-geglu"
            ) from None

    def __call__(self, up: Tensor) -> Tensor:
        """`f(up)`: `[..., G]` from `[..., G]`, or from `[..., 2G]` if gated; differentiable."""
        match self:
            case Activation.GELU:
                return F.gelu(up)
            case Activation.RELU:
                return F.relu(up)
            case Activation.SQUARED_RELU:
                return F.relu(up).square()
            case Activation.SWIGLU:
                gate, linear = up.chunk(2, dim=-1)
                return F.silu(gate) * linear
            case Activation.QUICK_GEGLU:
                gate, linear = up.chunk(2, dim=-1)
                return gate * torch.sigmoid(QUICK * gate) * linear

    def backward(self, grad: Tensor, up: Tensor) -> Tensor:
        """The gradient of `up` from `grad`, that of `f(up)`; both have the dtype of `up`."""
        aten = torch.ops.aten
        match self:
            case Activation.GELU:
                return aten.gelu_backward(grad, up)
            case Activation.RELU:
                return aten.threshold_backward(grad, up, 0)
            case Activation.SQUARED_RELU:
                return grad * (2 * F.relu(up))
            case Activation.SWIGLU:
                result = torch.empty_like(up)
                (gate, linear), halves = up.chunk(2, dim=-1), result.chunk(2, dim=-1)
                # In place, because a concatenation would read and write both halves once more.
                aten.silu_backward.grad_input(grad * linear, gate, grad_input=halves[0])
                torch.mul(grad, F.silu(gate), out=halves[1])
                return result
            case Activation.QUICK_GEGLU:
                gate, linear = up.chunk(2, dim=-1)
                sigmoid = torch.sigmoid(QUICK * gate)
                slope = sigmoid * (1 + QUICK * gate * (1 - sigmoid))
                return torch.cat((grad * linear * slope, grad * gate * sigmoid), dim=-1)
