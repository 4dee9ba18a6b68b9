"""The Triton kernels against float64, on any device: a script, for Triton's interpreter.

The interpreter is chosen when triton is imported, for the whole process; so the tests run this in
a process of its own, with `TRITON_INTERPRET=1`. It prints the relative errors as JSON.
"""

from __future__ import annotations

import json
import sys
import warnings
from itertools import product

import torch
from torch import Tensor

from megatron_sffn.ops.block_ffn import Pairs, block_ffn_pairs, loop, triton
from megatron_sffn.ops.block_ffn.pairs import Sorted

B = 5
SIZES = {"1x50": (1, 50), "16x50": (16, 50), "40x150": (40, 150)}
"""N and D."""
CASES = {"some": 17, "all to one block": 67, "no pairs": 13, "one row": 1}
"""Which pairs, and R: where all go to one block, more than one fp32 tile of its pairs."""
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TOLERANCES = {"fp32": 1e-5, "fp16": 4e-3, "bf16": 3e-2}


def main() -> None:
    """Print `{case: {what: error}}` of everything that the interpreter can do: not bf16."""
    assert triton.INTERPRETED, "set TRITON_INTERPRET=1"
    found = {}
    for case, size, dtype in product(CASES, SIZES, ("fp32", "fp16")):
        # Other tiles are all that fp16 adds.
        if dtype == "fp32" or case == "some":
            found[f"{case}, {size}, {dtype}"] = errors(case, size, dtype, "cpu")
    json.dump(found, sys.stdout)


def errors(case: str, size: str, dtype: str, device: str) -> dict[str, float]:
    """Relative errors of the products, and of `block_ffn` with its gradients, by name."""
    torch.manual_seed(len(case))
    with warnings.catch_warnings():
        # Makes `torch.empty` NaN, so that what is not written shows.
        torch.use_deterministic_algorithms(True, warn_only=True)
        warnings.simplefilter("ignore")
        found = _products(case, size, DTYPES[dtype], device)
        activations = {"1x50": ("gelu", None), "16x50": ("swiglu",), "40x150": ("gelu",)}[size]
        if case == "all to one block" and device == "cpu":
            activations = ()  # the interpreter takes a while, and the products have been compared
        for activation in activations:
            found |= _layer(case, size, DTYPES[dtype], device, activation)
        torch.use_deterministic_algorithms(False)
    return found


def _products(case: str, size: str, dtype: torch.dtype, device: str) -> dict[str, float]:
    pairs, rows, (cells, width) = _pairs(case, device), CASES[case], SIZES[size]
    order, offsets = triton.sort(pairs.blocks, B)
    expected = loop.sort(pairs.blocks, B)
    assert torch.equal(order, expected[0]) and torch.equal(offsets, expected[1])
    assert (order.dtype, offsets.dtype) == (torch.int32, torch.int64)
    by_block = Sorted(rows=pairs.rows[order.long()], offsets=offsets)
    x, table = _random(dtype, device, rows, width), _random(dtype, device, B, cells, width)
    h = _random(dtype, device, len(order), cells)
    found = {}
    for name, arguments, rest in (
        ("to_pairs", (x, table), (by_block,)),
        ("to_rows", (h, table), (by_block, rows)),
        ("to_table", (h, x), (by_block,)),
    ):
        ours = getattr(triton, name)(*arguments, *rest)
        if device != "cpu":  # the interpreter has one order only
            again = getattr(triton, name)(*arguments, *rest)
            assert torch.equal(ours, again), f"{name} depends on the order of execution"
        assert ours.dtype == dtype
        exact = getattr(loop, name)(*(t.double() for t in arguments), *rest)
        found[name] = _error(ours, exact)
    return found


def _layer(
    case: str, size: str, dtype: torch.dtype, device: str, activation: str | None
) -> dict[str, float]:
    """Of y and every gradient; without an activation, of a memory of values alone."""
    pairs, rows, (cells, width) = _pairs(case, device), CASES[case], SIZES[size]
    num_keys = cells * (2 if activation == "swiglu" else 1)
    tensors = {
        "x": _random(dtype, device, rows, width),
        "keys": _random(dtype, device, B, num_keys, width) * width**-0.5,
        "values": _random(dtype, device, B, cells, width) * cells**-0.5,
        "gates": _random(dtype, device, len(pairs.rows)),
    }
    dy = _random(dtype, device, rows, width)
    results = []
    for backend, wide in (("naive", torch.float64), ("triton", dtype)):
        leaves = {name: t.to(wide).requires_grad_() for name, t in tensors.items()}
        keys = None if activation is None else leaves["keys"]
        y = block_ffn_pairs(
            leaves["x"],
            keys,
            leaves["values"],
            pairs,
            leaves["gates"],
            activation=activation or "gelu",
            backend=backend,
        )
        assert y.dtype == wide
        y.backward(dy.to(wide))
        gradients = {f"d{name}": t.grad for name, t in leaves.items() if t.grad is not None}
        results.append({"y": y.detach(), **gradients})
    exact, ours = results
    assert ours.keys() == exact.keys()
    return {f"{activation} {name}": _error(ours[name], exact[name]) for name in exact}


def _pairs(case: str, device: str) -> Pairs:
    """Row by row; in `some`, block 2 is empty, and so are some rows."""
    met = torch.rand(CASES[case], B) < 0.6
    if case == "some":
        met[:, 2] = False
        met[1::4] = False
    elif case == "one row":
        met[:] = True
    else:
        met[:] = False
        met[:, 3] = case == "all to one block"
    places = met.nonzero().int().to(device)
    return Pairs(rows=places[:, 0].contiguous(), blocks=places[:, 1].contiguous())


def _random(dtype: torch.dtype, device: str, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype).to(device)


def _error(ours: Tensor, exact: Tensor) -> float:
    """Relative; absolute where all is zero. NaN where something was not written."""
    norm = exact.norm().item()
    return (ours.double() - exact).norm().item() / (norm or 1.0)


if __name__ == "__main__":
    main()
