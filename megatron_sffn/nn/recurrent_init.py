"""Initial values of the weights of Mamba layers and gated delta nets that are no matrices.

They are Megatron's, in its modules `MambaMixer` and `GatedDeltaNet`. Matrices, constants and norms
are those of `init.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

MAMBA_KERNEL = 4
"""Tokens that the convolution of a Mamba layer reads, the fan-in of its biases."""


def recurrent_init(name: str) -> Callable[[Tensor], object] | None:
    """The init method of a weight, by its name in a checkpoint; None for any other weight."""
    if ".conv1d.bias" in name:
        return _draw_conv_bias
    if ".conv1d.weight" in name:
        return _draw_conv_weight
    if name.endswith(".A_log"):
        return _draw_log_rates
    if name.endswith(".mixer.dt_bias"):
        return _draw_step_bias
    return None


def _draw_conv_weight(weight: Tensor) -> None:
    """Between ±1/sqrt(fan-in); each channel has one input channel."""
    bound = weight.shape[-1] ** -0.5
    weight.uniform_(-bound, bound)


def _draw_conv_bias(bias: Tensor) -> None:
    """Between ±1/sqrt(fan-in) of the weight."""
    bound = MAMBA_KERNEL**-0.5
    bias.uniform_(-bound, bound)


def _draw_log_rates(rates: Tensor) -> None:
    """Logarithms of rates of decay between 1 and 16."""
    rates.uniform_(1, 16).log_()


def _draw_step_bias(bias: Tensor) -> None:
    """The biases whose softplus is between 0.001 and 0.1, by equal chance at every scale."""
    steps = bias.uniform_(math.log(0.001), math.log(0.1)).exp_()
    bias.copy_(steps + (-(-steps).expm1()).log())  # the inverse of softplus
