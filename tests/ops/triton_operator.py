"""Check the operator that launches Triton kernels, in Triton's interpreter; a script.

It runs the products and `route_topk`, keeps the first launch of each kernel, and prints as JSON:
for each kernel the errors that `torch.library.opcheck` finds, and the largest difference that
`torch.compile` makes to `block_ffn`.
"""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from megatron_sffn.ops import route_topk, triton_launch
from megatron_sffn.ops.block_ffn import (
    block_ffn_pairs,
    pairs_of_ids,
    triton_grouped,
    triton_masked,
    triton_table,
)
from megatron_sffn.ops.block_ffn.pairs import Sorted

OPERATOR = torch.ops.megatron_sffn.launch_triton.default
T, D, K = 6, 16, 2
FORMS = {"masked": (3, 8), "grouped": (40, 8), "single cells": (40, 1)}
"""Form of the products -> B and G for which they take it."""


class Starts(TorchDispatchMode):
    """Record the first launch of each kernel, with its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.arguments: dict[str, tuple[Any, ...]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is OPERATOR:
            # The names are part of the key, because a null pointer is not among them. The tensors
            # are copies, because a second launch would not change what the first has written.
            name = f"{args[0].rpartition('.')[2]}({args[4]})"
            if name not in self.arguments:
                self.arguments[name] = tree_map_only(Tensor, Tensor.clone, args)
        return func(*args, **(kwargs or {}))


def main() -> None:
    """Print `{kernel: errors}` and `{"change": largest difference}`."""
    assert triton_launch.INTERPRETED, "set TRITON_INTERPRET=1"
    # torch warns about itself, and the test reads the output of this process.
    warnings.simplefilter("ignore")
    errors: dict[str, str | float] = {}
    with Starts() as starts:
        for sizes in FORMS.values():
            layer(*numbers(*sizes))[0].backward()
        layer(*numbers(*FORMS["grouped"]), gated=False)[0].backward()
        add_to_table(*FORMS["grouped"])
    for kernel, arguments in starts.arguments.items():
        # Without the slow test under AOTAutograd, which `change` does for all kernels.
        tests = ("test_schema", "test_autograd_registration", "test_faketensor")
        checks = torch.library.opcheck(OPERATOR, arguments, test_utils=tests, raise_exception=False)
        errors[kernel] = "; ".join(f"{k}: {v}" for k, v in checks.items() if v != "SUCCESS")
    errors["change"] = change(*numbers(*FORMS["grouped"]))
    json.dump(errors, sys.stdout)


def layer(
    x: Tensor, keys: Tensor, values: Tensor, scores: Tensor, *, gated: bool = True
) -> tuple[Tensor, Tensor]:
    """`route_topk` and `block_ffn`; returns a loss and the outputs."""
    ids = route_topk(scores, K, backend="triton")
    gates = scores.gather(1, ids).sigmoid() if gated else None
    pairs, gates = pairs_of_ids(ids, gates, may_be_empty=False)
    y = block_ffn_pairs(x, keys, values, pairs, gates, backend="triton")
    return y.square().sum(), y


def add_to_table(blocks: int, cells: int) -> None:
    """Run the products that add to their result, and those of a block with many pairs."""
    pairs = Sorted(
        rows=torch.arange(40, dtype=torch.int32),
        offsets=torch.tensor([0] + blocks * [40]),
    )
    x, h, start = torch.randn(40, D), torch.randn(40, cells), torch.randn(blocks, cells, D)
    with mock.patch.object(triton_table, "CHUNK", 16):
        for form in (triton_grouped, triton_masked):
            form.to_table(h, x, pairs, into=start)


def numbers(blocks: int, cells: int) -> list[Tensor]:
    """The arguments of `layer`."""
    torch.manual_seed(0)
    shapes = (T, D), (blocks, cells, D), (blocks, cells, D), (T, blocks)
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def change(*tensors: Tensor) -> float:
    """The largest change of outputs and gradients by compiling, with no graph break."""
    results = []
    for call in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        loss, y = call(*tensors)
        results.append((y, *torch.autograd.grad(loss, tensors)))
    # `max` of Python would drop a NaN.
    changes = [(a - b).abs().max() for a, b in zip(*results, strict=True)]
    return torch.stack(changes).max().item()


if __name__ == "__main__":
    main()
