"""The inputs of `benchmarks.blocks`, and the check that a contender computed the right result.

Inputs: the sizes of a layer. Outputs: tokens, tables and routing drawn from one seed; the result in
float64; the difference of a contender's result from it.

Design notes:
- The reference is the oracle of `block_ffn` in float64, on some tokens at a time: outputs, and the
  gradients of tokens, tables and gates.
- Differences are relative to the norm, not to the largest value. If the input of a ReLU is zero
  within rounding, its derivative may be 0 or 1; that changes one row much, and the norm hardly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from megatron_sffn.ops.activation import Activation
from megatron_sffn.ops.block_ffn import op

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""Largest difference of an output or gradient, relative to its norm."""
RELU_TOLERANCE = 2e-3
"""Least tolerance for ReLU, where a few of the millions of derivatives are 0 instead of 1."""
REFERENCE_TOKENS = 256
"""Tokens per step of the oracle, which computes all M cells for each token."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """The inputs of every contender, on one device and in one dtype.

    Args:
        x: `[T, D]` tokens.
        dy: `[T, D]`, the gradient of the output.
        keys: `[B, G, D]`; `[B, 2G, D]` with the gate keys first for `swiglu`.
        values: `[B, G, D]`.
        block_ids: `[T, K]` int64, distinct within a row.
        gates: `[T, K]` factors of the blocks' outputs, or None for 1.
        activation: f.
    """

    x: Tensor
    dy: Tensor
    keys: Tensor
    values: Tensor
    block_ids: Tensor
    gates: Tensor | None
    activation: Activation

    @property
    def num_blocks(self) -> int:
        """B."""
        return len(self.values)

    @cached_property
    def ones_or_gates(self) -> Tensor:
        """`[T, K]` gates, or ones for contenders that always multiply."""
        return (
            torch.ones_like(self.block_ids, dtype=self.x.dtype)
            if self.gates is None
            else self.gates
        )

    @classmethod
    def draw(
        cls,
        *,
        tokens: int,
        hidden_size: int,
        active_cells: int,
        block_size: int,
        expansion: int,
        activation: Activation,
        dtype: torch.dtype,
        gated: bool,
        device: Any,
    ) -> Problem:
        """Draw uniform random routing and tables; equal sizes draw equal numbers on any device."""
        draw = torch.Generator().manual_seed(1)
        blocks, active = expansion * active_cells // block_size, active_cells // block_size
        cells = block_size * (2 if activation.gated else 1)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=draw) * scale).to(device, dtype)

        return cls(
            x=normal(tokens, hidden_size),
            dy=normal(tokens, hidden_size),
            # This scale keeps up projections and outputs near 1, also in half precision.
            keys=normal(blocks, cells, hidden_size, scale=hidden_size**-0.5),
            values=normal(blocks, block_size, hidden_size, scale=active_cells**-0.5),
            block_ids=torch.rand(tokens, blocks, generator=draw).topk(active).indices.to(device),
            gates=(torch.rand(tokens, active, generator=draw) + 0.5).to(device, dtype)
            if gated
            else None,
            activation=activation,
        )


def tolerance(problem: Problem) -> float:
    """The largest difference of a result that counts as correct."""
    least = RELU_TOLERANCE if problem.activation is Activation.RELU else 0.0
    return max(least, TOLERANCES[problem.x.dtype])


def reference(problem: Problem) -> dict[str, Tensor]:
    """Output `y` and the gradients of `x`, `keys`, `values` and `gates`, in float64."""
    leaves = {name: getattr(problem, name) for name in ("x", "keys", "values", "gates")}
    leaves = {
        name: leaf.double().requires_grad_() for name, leaf in leaves.items() if leaf is not None
    }
    outputs = []
    for start in range(0, len(problem.x), REFERENCE_TOKENS):
        chunk = slice(start, start + REFERENCE_TOKENS)
        gates = leaves["gates"][chunk] if "gates" in leaves else None
        y = op.block_ffn(
            leaves["x"][chunk],
            leaves["keys"],
            leaves["values"],
            problem.block_ids[chunk],
            gates,
            activation=problem.activation,
            backend="naive",
        )
        y.backward(problem.dy[chunk].double())
        outputs.append(y.detach())
    grads = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {"y": torch.cat(outputs), **grads}


def disagreement(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Largest difference of any output or gradient, relative to the norm of the reference."""
    assert actual.keys() == expected.keys(), (actual.keys(), expected.keys())
    largest = 0.0
    for name, right in expected.items():
        error = (actual[name].double() - right).norm() / right.norm()
        # Every comparison with NaN is false, but NaN has to count as wrong.
        largest = max(largest, float(error.nan_to_num(nan=float("inf"))))
    return largest
