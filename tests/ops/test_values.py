"""Values without keys: every backend against the formula, on ragged rows and in bf16."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from megatron_sffn.ops import block_ffn
from megatron_sffn.ops.block_ffn import Pairs, block_ffn_pairs
from megatron_sffn.utils.errors import ConfigError

R, B, D = 11, 17, 5


def pairs_of(case: str) -> Pairs:
    """Pairs with ascending rows; a row may have any number of values, and a value twice."""
    rows = {
        "as many each": torch.arange(R).repeat_interleave(3),
        "ragged": torch.tensor([1, 1, 1, 4, 4, 9]),
        "the first and last have none": torch.arange(1, R - 1),
        "one row has everything": torch.full((B,), 6),
        "none at all": torch.zeros(0, dtype=torch.long),
    }[case]
    torch.manual_seed(len(rows))
    blocks = torch.randint(B, rows.shape)
    if case == "ragged":
        blocks[1] = blocks[0]
    return Pairs(rows=rows.int(), blocks=blocks.int())


def weighted_values(
    num_rows: int, values: Tensor, pairs: Pairs, gates: Tensor, backend: str = "auto"
) -> Tensor:
    x = values.new_zeros(num_rows, 0)
    return block_ffn_pairs(x, None, values[:, None], pairs, gates, backend=backend)


naive = partial(weighted_values, backend="naive")
in_torch = partial(weighted_values, backend="torch")

CASES = [
    "as many each",
    "ragged",
    "the first and last have none",
    "one row has everything",
    "none at all",
]


def values_and_gates(pairs: Pairs, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    values = torch.randn(B, D, dtype=torch.float64).to(dtype).requires_grad_()
    gates = torch.randn(len(pairs.rows), dtype=torch.float64).to(dtype).requires_grad_()
    return values, gates


@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_are_those_of_the_formula(case: str) -> None:
    pairs = pairs_of(case)
    values, gates = values_and_gates(pairs)
    weights = torch.randn(R, D, dtype=torch.float64)
    rows = [torch.zeros(D, dtype=torch.float64) for _ in range(R)]
    for gate, row, block in zip(gates, pairs.rows, pairs.blocks, strict=True):
        rows[row] = rows[row] + gate * values[block]
    expected = torch.stack(rows)
    expected_grads = (torch.zeros_like(values), torch.zeros_like(gates))
    if len(gates):
        expected_grads = torch.autograd.grad((expected * weights).sum(), (values, gates))
    for op in (weighted_values, in_torch, naive):
        y = op(R, values, pairs, gates)
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)
        actual_grads = torch.autograd.grad((y * weights).sum(), (values, gates))
        for a, b in zip(actual_grads, expected_grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        used = torch.zeros(B, dtype=torch.bool)
        used[pairs.blocks] = True
        assert (y[~torch.isin(torch.arange(R), pairs.rows)] == 0).all()
        assert (actual_grads[0][~used] == 0).all()


@pytest.mark.parametrize("op", [weighted_values, in_torch])
def test_the_backward_pass_is_the_derivative(op: Callable[..., Tensor]) -> None:
    pairs = pairs_of("ragged")
    values, gates = values_and_gates(pairs)
    assert torch.autograd.gradcheck(lambda v, g: op(R, v, pairs, g), (values, gates))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_dtypes_stay_near_the_float64_oracle(dtype: torch.dtype) -> None:
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}[dtype]
    torch.manual_seed(0)
    rows, active = 40, 64
    pairs = Pairs(
        rows=torch.arange(rows, dtype=torch.int32).repeat_interleave(active),
        blocks=torch.randint(300, (rows * active,), dtype=torch.int32),
    )
    results = []
    narrow = torch.randn(300, 33).to(dtype), torch.randn(rows * active).to(dtype)
    weights = torch.randn(rows, 33).to(dtype)
    for op, width in ((naive, torch.float64), (weighted_values, dtype)):
        values, gates = (t.to(width).requires_grad_() for t in narrow)
        y = op(rows, values, pairs, gates)
        assert y.dtype == width
        y.backward(weights.to(width))
        results.append([t.double() for t in (y.detach(), values.grad, gates.grad)])
    for exact, actual in zip(*results, strict=True):
        error = (actual - exact).norm() / exact.norm()
        assert error < tolerance, f"relative error {error:.2e}"


def test_gates_in_fp32_weigh_values_in_half_precision() -> None:
    # Routers give gates in fp32.
    pairs = pairs_of("as many each")
    values, _ = values_and_gates(pairs, torch.bfloat16)
    gates = torch.randn(len(pairs.rows), requires_grad=True)
    y = weighted_values(R, values, pairs, gates)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert gates.grad.dtype == torch.float32 and values.grad.dtype == torch.bfloat16


def test_no_rows_give_no_output() -> None:
    pairs = pairs_of("none at all")
    values, gates = values_and_gates(pairs)
    y = weighted_values(0, values, pairs, gates)
    assert y.shape == (0, D)
    y.sum().backward()
    assert (values.grad == 0).all()


@pytest.mark.parametrize("backend", ["naive", "torch", "cpu", "auto"])
def test_block_ffn_accepts_values_without_keys(backend: str) -> None:
    torch.manual_seed(2)
    x = torch.zeros(R, 0, dtype=torch.float64)
    values = torch.randn(B, 1, D, dtype=torch.float64)
    ids = torch.randint(B, (R, 4))
    ids[3], ids[5, 1] = -1, -1
    gates = torch.randn(R, 4, dtype=torch.float64, requires_grad=True)
    y = block_ffn(x, None, values, ids, gates, backend=backend)
    masked_gates = (ids >= 0).double() * gates
    expected = torch.einsum("tk,tkd->td", masked_gates, values[:, 0][ids.clamp(min=0)])
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)
    (grad,) = torch.autograd.grad(y.sum(), gates)
    assert (grad[ids < 0] == 0).all()


def test_values_without_keys_need_gates() -> None:
    pairs = pairs_of("ragged")
    values, _ = values_and_gates(pairs)
    with pytest.raises(ConfigError, match="coefficients"):
        block_ffn_pairs(values[:R, :0], None, values[:, None], pairs)
