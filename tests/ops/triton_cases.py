"""Compare the Triton kernels with the oracles, on any device; a script for Triton's interpreter.

The interpreter is chosen for the whole process when triton is imported. So the tests run this
script in its own process, with `TRITON_INTERPRET=1`. It prints the errors as JSON: for the products
their size, relative to float64; for `route_topk` the share of rows that differ.
"""

from __future__ import annotations

import json
import sys
import warnings
from unittest import mock

import torch
from torch import Tensor

from megatron_sffn.ops import device, route_topk
from megatron_sffn.ops.activation import Activation, AnyActivation, ClampedActivation
from megatron_sffn.ops.block_ffn import (
    Pairs,
    block_ffn_pairs,
    epilogue,
    torch_backend,
    triton,
    triton_fused,
    triton_grouped,
    triton_masked,
    triton_table,
)
from megatron_sffn.ops.block_ffn.pairs import Sorted
from megatron_sffn.ops.route_topk import triton as topk

B = 5
FORMS = {"grouped": triton_grouped, "masked": triton_masked}
SIZES = {"1x48": (1, 48), "7x16": (7, 16), "16x48": (16, 48), "136x80": (136, 80)}
"""N and D. Runs of 1, 1, 16 and 8 cells under a mask; narrow blocks and wide ones."""
CASES = {"some": 17, "all to one block": 67, "no pairs": 13, "one row": 1, "many rows": 150}
"""Kind of pairs -> R; if all have one block, its pairs fill more than one fp32 tile."""
FUSED = {
    "1x48": ((Activation.RELU, True),),
    "7x16": ((Activation.SQUARED_RELU, False), (Activation.QUICK_GEGLU, True)),
    "16x48": ((Activation.GELU, True),),
    "136x80": ((Activation.SWIGLU, True),),
}
"""Activations of the fused products at each size, and whether there are gates."""
CLAMPED = ClampedActivation(Activation.QUICK_GEGLU, clamp=1.0, offset=1.0)
LAYERS = {"1x48": ("gelu", None), "16x48": ("swiglu", CLAMPED)}
"""Activations of whole layers, of which the first is computed by the masked form and the last two
by both; None stands for values without keys."""
CHOICES = {"1 of 1": (1, 1), "33 of 33": (33, 33), "1 of 300": (300, 1), "70 of 5000": (5000, 70)}
"""B and K for `route_topk`; 5000 scores are two tiles."""
CHOSEN = [*((choice, "fp32") for choice in CHOICES), ("1 of 300", "fp16"), ("1 of 300", "bf16")]
"""Cases of `route_topk` and dtypes for the interpreter."""
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TOLERANCES = {"fp32": 1e-5, "fp16": 4e-3, "bf16": 3e-2}


def main() -> None:
    """Print `{case: {name: error}}` for everything that the interpreter can run."""
    assert triton.INTERPRETED, "set TRITON_INTERPRET=1"
    # With the tiles of an H100, which are the largest.
    with mock.patch.object(device, "capability", lambda _: (9, 0)):
        by_case = {", ".join(case): errors(*case, "cpu") for case in interpreted()}
    by_case |= {", ".join(case): differing_shares(*case, "cpu") for case in CHOSEN}
    json.dump(by_case, sys.stdout)


def interpreted() -> list[tuple[str, str, str]]:
    """The cases, sizes and dtypes for the slow interpreter, which cannot multiply bf16."""
    return [
        *(("some", size, "fp32") for size in SIZES),
        *(("some", size, "fp16") for size in ("7x16", "136x80")),  # other tiles
        ("all to one block", "16x48", "fp32"),
        ("no pairs", "7x16", "fp32"),
        ("one row", "1x48", "fp32"),
        # More than one tile of rows.
        ("many rows", "7x16", "fp32"),
        ("many rows", "16x48", "fp16"),
    ]


def errors(case: str, size: str, dtype: str, device: str) -> dict[str, float]:
    """Relative errors of the products, and of `block_ffn` with its gradients, by name."""
    torch.manual_seed(len(case))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Fill `torch.empty` with NaN, which reveals numbers that are never written.
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            return _errors(case, size, DTYPES[dtype], device)
        finally:
            torch.use_deterministic_algorithms(False)


def _errors(case: str, size: str, dtype: torch.dtype, device: str) -> dict[str, float]:
    # Small limits, so that small sizes have several chunks and groups of columns.
    with (
        mock.patch.object(triton_table, "CHUNK", 16),
        mock.patch.object(triton_grouped, "PARTS_BYTES", 0),
    ):
        by_name = _products(case, size, dtype, device)
    for activation, with_gates in FUSED[size]:
        by_name |= _fused(case, size, dtype, device, activation, with_gates)
    # The interpreter takes a while, and the products have been compared.
    if device != "cpu" or case == "some":
        for activation in LAYERS.get(size, ()):
            by_name |= _layer(case, size, dtype, device, activation)
    return by_name


def differing_shares(choice: str, dtype: str, device: str) -> dict[str, float]:
    """The share of ids that differ from the oracle's, and of invalid ids in rows with NaN."""
    blocks, active = CHOICES[choice]
    torch.manual_seed(blocks)
    scores = _scores(blocks).to(DTYPES[dtype]).to(device)
    # The oracle runs on a CPU in fp32, which represents all scores exactly.
    expected = route_topk(scores.cpu().float(), active, backend="naive").to(device)
    ids = route_topk(scores, active, backend="triton")
    assert ids.dtype == torch.int64
    assert route_topk(scores[:0], active, backend="triton").shape == (0, active)
    with_nan = scores.clone()
    with_nan[:, ::2] = torch.nan
    chosen = topk.route_topk(with_nan, active)
    assert (chosen.diff(dim=1) > 0).all() and chosen.min() >= 0 and chosen.max() < blocks
    invalid = 0
    for number in (torch.nan, -torch.nan):
        scores[-1, -1] = number
        (row,) = route_topk(scores[-1:], active, backend="triton").tolist()
        invalid += sorted(set(row)) != row or row[0] < 0 or row[-1] >= blocks
    return {"ids": (ids != expected).double().mean().item(), "NaN": invalid / 2}


def _scores(blocks: int) -> Tensor:
    """One row of each kind: any, few values, one value, infinite ones, zeros of both signs."""
    any_ = torch.randn(blocks)
    infinite = any_.where(any_ > -0.5, -torch.inf).where(any_ < 1.5, torch.inf)
    zeros = torch.zeros(blocks).copysign(any_)
    return torch.stack((any_, (2 * any_).round(), torch.full_like(any_, -1.5), infinite, zeros))


def _products(case: str, size: str, dtype: torch.dtype, device: str) -> dict[str, float]:
    pairs, rows, (cells, width) = _pairs(case, device), CASES[case], SIZES[size]
    order, offsets = triton.sort(pairs.blocks, B)
    expected = torch_backend.sort(pairs.blocks, B)
    assert torch.equal(order, expected[0]) and torch.equal(offsets, expected[1])
    assert (order.dtype, offsets.dtype) == (torch.int32, torch.int64)
    by_block = Sorted(rows=pairs.rows[order.long()], offsets=offsets, order=order)
    x, table = _random(dtype, device, rows, width), _random(dtype, device, B, cells, width)
    h = _random(dtype, device, len(order), cells)
    by_name = {}
    for name, arguments, pairs_and_rows in (
        ("to_pairs", (x, table), (by_block,)),
        ("to_rows", (h, table), (by_block, rows)),
        ("to_table", (h, x), (by_block,)),
    ):
        exact = getattr(torch_backend, name)(*(t.double() for t in arguments), *pairs_and_rows)
        for form, products in FORMS.items():
            actual = getattr(products, name)(*arguments, *pairs_and_rows)
            if device != "cpu":  # the interpreter has one order only
                second_run = getattr(products, name)(*arguments, *pairs_and_rows)
                assert torch.equal(actual, second_run), (
                    f"{form} {name} depends on the order of execution"
                )
            assert actual.dtype == dtype
            by_name[f"{form} {name}"] = _error(actual, exact)
            if name == "to_table":
                start = _random(torch.float32, device, B, cells, width)
                buffer = start.clone()
                assert products.to_table(*arguments, *pairs_and_rows, into=buffer) is buffer
                by_name[f"{form} {name}, added"] = _error(buffer, start.double() + exact)
    return by_name


def _fused(
    case: str,
    size: str,
    dtype: torch.dtype,
    device: str,
    activation: Activation,
    with_gates: bool,
) -> dict[str, float]:
    """Errors of the fused products, against the epilogue in float64.

    The epilogue gets the up projections as the product rounded them, and the gradient of the
    coefficients without rounding.
    """
    pairs, rows, (cells, width) = _pairs(case, device), CASES[case], SIZES[size]
    order, offsets = triton.sort(pairs.blocks, B)
    by_block = Sorted(rows=pairs.rows[order.long()], offsets=offsets, order=order)
    x, dy = _random(dtype, device, rows, width), _random(dtype, device, rows, width)
    keys = _random(dtype, device, B, cells * activation.keys_per_cell, width) * width**-0.5
    values = _random(dtype, device, B, cells, width)
    gates = _random(torch.float32, device, len(order)) if with_gates else None
    ups, h = triton_fused.up_activated(x, keys, by_block, gates, activation)
    actual = (
        ups,
        h,
        *triton_fused.down_backward_activated(dy, values, by_block, ups, gates, activation),
    )
    exact_gates = None if gates is None else gates.double()
    dh = torch_backend.to_pairs(dy.double(), values.double(), by_block)
    exact = (
        torch_backend.to_pairs(x.double(), keys.double(), by_block),
        epilogue.activated(ups.double(), exact_gates, activation),
        *epilogue.backward(ups.double(), dh, exact_gates, activation),
    )
    by_name = {}
    for name, result, expected in zip(
        ("ups", "h", "h again", "dups", "dgates"), actual, exact, strict=True
    ):
        assert (result is None) == (expected is None), name
        if result is not None and expected is not None:
            assert result.dtype == (torch.float32 if name == "dgates" else dtype), name
            by_name[f"fused {activation}: {name}"] = _error(result, expected)
    return by_name


def _layer(
    case: str, size: str, dtype: torch.dtype, device: str, activation: AnyActivation | str | None
) -> dict[str, float]:
    """Errors of y and every gradient; without an activation, of values without keys."""
    pairs, rows, (cells, width) = _pairs(case, device), CASES[case], SIZES[size]
    if activation is None:
        pairs = Pairs(
            rows=pairs.rows.repeat_interleave(2), blocks=pairs.blocks.repeat_interleave(2)
        )
    num_keys = cells * (2 if activation in ("swiglu", CLAMPED) else 1)
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
    exact, actual = results
    assert actual.keys() == exact.keys()
    return {f"{activation} {name}": _error(actual[name], exact[name]) for name in exact}


def _pairs(case: str, device: str) -> Pairs:
    """Pairs, row by row; in `some` and `many rows`, block 2 and some rows are empty."""
    is_pair = torch.rand(CASES[case], B) < 0.6
    if case in ("some", "many rows"):
        is_pair[:, 2] = False
        is_pair[1::4] = False
    elif case == "one row":
        is_pair[:] = True
    else:
        is_pair[:] = False
        is_pair[:, 3] = case == "all to one block"
    indices = is_pair.nonzero().int().to(device)
    return Pairs(rows=indices[:, 0].contiguous(), blocks=indices[:, 1].contiguous())


def _random(dtype: torch.dtype, device: str, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype).to(device)


def _error(actual: Tensor, exact: Tensor) -> float:
    """The relative error; absolute if the exact tensor is zero; NaN if a number was not written."""
    norm = exact.norm().item()
    return (actual.double() - exact).norm().item() / (norm or 1.0)


if __name__ == "__main__":
    main()
