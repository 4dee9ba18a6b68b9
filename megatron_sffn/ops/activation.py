"""The nonlinearity of a memory cell, and its derivative for the hand-written backward passes.

Inputs: up projections `[..., G]`, or `[..., 2G]` (gate half first) if gated, which is the layout
of Megatron's fused first linear layer. Outputs: coefficients of the values, `[..., G]`.

Design notes: a clamped activation is a gated one of other inputs, so kernels that have `Activation`
in them leave it to the torch code of `block_ffn/epilogue.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
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
    def of(cls, config: TransformerConfig) -> AnyActivation:
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
        clamp, offset = config.activation_func_clamp_value, config.glu_linear_offset
        try:
            activation = known[name, bool(config.gated_linear_unit)]
            plain = clamp is None and not offset
            return activation if plain else ClampedActivation(activation, clamp, offset)
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
            case _:
                return self.of_halves(*up.chunk(2, dim=-1))

    def of_halves(self, gate: Tensor, linear: Tensor) -> Tensor:
        """A gated activation of its halves `[..., G]`."""
        if self is Activation.SWIGLU:
            return F.silu(gate) * linear
        assert self is Activation.QUICK_GEGLU, self
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


@dataclass(frozen=True)
class ClampedActivation:
    """A gated activation of clamped inputs, `f(min(gate, c), clamp(linear, -c, c) + offset)`.

    As in Megatron's MLP, and with `quick_geglu`, c = 7 and the offset 1 in gpt-oss.

    Args:
        function: f, which is gated.
        clamp: c (`--activation-func-clamp-value`); None for no clamp.
        offset: of the linear half (`--glu-linear-offset`).

    Raises:
        ConfigError: if f has no gate, or c is not positive.
    """

    function: Activation
    clamp: float | None
    offset: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what Megatron would ignore, or what leaves no output."""
        if not self.function.gated:
            raise ConfigError(
                f"--activation-func-clamp-value {self.clamp} and --glu-linear-offset {self.offset} "
                f"act on the halves of a gated activation, and {self.function} has no gate; leave "
                "them out, or use --swiglu or --quick-geglu"
            )
        if self.clamp is not None and self.clamp <= 0:
            raise ConfigError(
                f"--activation-func-clamp-value {self.clamp} must be greater than 0; leave it out "
                "for no clamp"
            )

    gated = True
    keys_per_cell = 2

    @property
    def value(self) -> str:
        """The name of the function."""
        return self.function.value

    def _halves(self, up: Tensor) -> tuple[Tensor, Tensor]:
        """The inputs of the function."""
        gate, linear = up.chunk(2, dim=-1)
        if self.clamp is not None:
            gate, linear = gate.clamp(max=self.clamp), linear.clamp(-self.clamp, self.clamp)
        return gate, linear + self.offset if self.offset else linear

    def __call__(self, up: Tensor) -> Tensor:
        """As `Activation.__call__`."""
        return self.function.of_halves(*self._halves(up))

    def backward(self, grad: Tensor, up: Tensor) -> Tensor:
        """As `Activation.backward`; no gradient passes where an input was clamped."""
        result = self.function.backward(grad, torch.cat(self._halves(up), dim=-1))
        if self.clamp is not None:
            gate, linear = up.chunk(2, dim=-1)
            clamped = torch.cat((gate > self.clamp, linear.abs() > self.clamp), dim=-1)
            result.masked_fill_(clamped, 0)
        return result


type AnyActivation = Activation | ClampedActivation
"""What `block_ffn` computes with."""
