"""Sizes, parameters and FLOPs of recurrent layers: Mamba-2, and gated delta nets.

Inputs: Megatron's flags of these layers. Outputs: exact parameters, and Megatron's FLOPs of a layer
for one token.

Design notes: the products of the projections are exact. The recurrence itself is counted by
Megatron's formulas (`num_floating_point_operations`), which do not depend on how a kernel cuts a
sequence into chunks. For Mamba Megatron takes twice the hidden size as the width of all heads, here
it is their width.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sffn.nn.recurrent_init import MAMBA_KERNEL

MAMBA_EXPANSION = 2
"""Width of all heads over the hidden size, where `--mamba-num-heads` is not given."""


@dataclass(frozen=True, kw_only=True)
class Mamba:
    """Sizes of a Mamba-2 layer.

    Args:
        mamba_num_heads: heads; None for twice the hidden size over the width of a head.
        mamba_head_dim: width of a head.
        mamba_state_dim: numbers of a state for each channel of a head.
        mamba_num_groups: groups of heads that share the projections to and from their states.
    """

    mamba_num_heads: int | None = None
    mamba_head_dim: int = 64
    mamba_state_dim: int = 128
    mamba_num_groups: int = 8

    def heads(self, hidden_size: int) -> int:
        """Number of heads."""
        return self.mamba_num_heads or MAMBA_EXPANSION * hidden_size // self.mamba_head_dim

    def parameters(self, hidden_size: int) -> int:
        """Parameters of a layer without the norm before it.

        Beside two projections these are the convolution with its biases, three numbers of each
        head, and the norm of the gated output.
        """
        heads = self.heads(hidden_size)
        inner = heads * self.mamba_head_dim
        convolved = inner + 2 * self.mamba_num_groups * self.mamba_state_dim
        projected = inner + convolved + heads
        count = hidden_size * projected + inner * hidden_size
        return count + convolved * (MAMBA_KERNEL + 1) + 3 * heads + inner

    def flops(self, hidden_size: int) -> int:
        """Forward FLOPs of a layer for one token."""
        heads = self.heads(hidden_size)
        inner = heads * self.mamba_head_dim
        projected = 2 * inner + 2 * self.mamba_num_groups * self.mamba_state_dim + heads
        scan = 7 * inner * self.mamba_state_dim
        return 2 * hidden_size * projected + scan + 2 * inner * hidden_size


@dataclass(frozen=True, kw_only=True)
class DeltaNet:
    """Sizes of a gated delta net.

    Args:
        linear_conv_kernel_dim: tokens that the convolution reads.
        linear_key_head_dim: width of a query and of a key.
        linear_value_head_dim: width of a value and of its gate.
        linear_num_key_heads: heads of queries and keys.
        linear_num_value_heads: heads of values.
    """

    linear_conv_kernel_dim: int = 4
    linear_key_head_dim: int = 128
    linear_value_head_dim: int = 128
    linear_num_key_heads: int = 16
    linear_num_value_heads: int = 32

    @property
    def key_width(self) -> int:
        """Width of all keys."""
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def value_width(self) -> int:
        """Width of all values."""
        return self.linear_num_value_heads * self.linear_value_head_dim

    def parameters(self, hidden_size: int, norm: int) -> int:
        """Parameters of a layer without the norm before it.

        Args:
            hidden_size: D.
            norm: parameters of the norm of a head's output.
        """
        convolved = 2 * self.key_width + self.value_width
        projected = convolved + self.value_width + 2 * self.linear_num_value_heads
        count = hidden_size * (projected + self.value_width)
        count += convolved * self.linear_conv_kernel_dim
        return count + 2 * self.linear_num_value_heads + norm

    def flops(self, hidden_size: int) -> int:
        """Forward FLOPs of a layer for one token."""
        convolved = 2 * self.key_width + self.value_width
        projected = convolved + self.value_width + 2 * self.linear_num_value_heads
        products = hidden_size * (projected + self.value_width)
        products += convolved * self.linear_conv_kernel_dim
        products += 4 * self.linear_num_value_heads * self.linear_value_head_dim**2
        return 2 * products
