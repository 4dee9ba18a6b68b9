"""The backends made of torch operators, against the oracle: grouped, masked, bags, torch."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from megatron_sffn.ops import Activation, ClampedActivation, block_ffn
from megatron_sffn.ops.activation import AnyActivation
from megatron_sffn.ops.block_ffn import Pairs, bags, block_ffn_pairs, grouped, masked
from megatron_sffn.utils.errors import ConfigError
from tests.support.simulated_gpu import simulate_gpu

D, R = 24, 37
BACKENDS = ("grouped", "masked", "bags", "torch")
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def load(kind: str, blocks: int) -> Pairs:
    """Pairs of R rows and some blocks; if there are several blocks, one is empty."""
    if kind == "none":
        is_pair = torch.zeros(R, blocks, dtype=torch.bool)
    elif kind == "skewed":
        is_pair = torch.rand(R, blocks) < torch.linspace(0.0, 0.6, blocks)
        is_pair[:, -1] = True
        is_pair[R // 2] = False
    else:
        is_pair = torch.rand(R, blocks) < 0.4
        is_pair[:, blocks // 2] = blocks == 1
    rows, ids = is_pair.nonzero().int().unbind(1)
    return Pairs(rows=rows.contiguous(), blocks=ids.contiguous())


def compute(
    backend: str, dtype: torch.dtype, tensors: list[Tensor], pairs: Pairs, activation: AnyActivation
) -> list[Tensor]:
    """Output and every gradient; the last tensor is the gates, if any, in fp32 at least."""
    wide = torch.promote_types(dtype, torch.float32)
    inputs = [
        tensor.to(wide if index == 3 else dtype, copy=True).requires_grad_()
        for index, tensor in enumerate(tensors)
    ]
    gates = inputs[3] if len(inputs) > 3 else None
    y = block_ffn_pairs(*inputs[:3], pairs, gates, activation=activation, backend=backend)
    assert y.dtype == dtype
    y.backward(tensors[0][:, : y.shape[1]].to(dtype) + 1)
    grads = [tensor.grad for tensor in inputs]
    assert [grad.dtype for grad in grads if grad is not None] == [t.dtype for t in inputs]
    return [y.detach(), *grads]


def assert_agree(
    backend: str, dtype: torch.dtype, tensors: list[Tensor], pairs: Pairs, activation: AnyActivation
) -> None:
    # The oracle starts from the rounded inputs, whose rounding is not an error of the op.
    rounded = [tensor.to(dtype) for tensor in tensors[:3]] + tensors[3:]
    actual = compute(backend, dtype, rounded, pairs, activation)
    exact = compute("naive", torch.float64, rounded, pairs, activation)
    for tensor_name, result, expected in zip(
        ("y", "x", "keys", "values", "gates"), actual, exact, strict=False
    ):
        error = (result.double() - expected).norm() / expected.norm().clamp(min=1e-30)
        assert error < TOLERANCES[dtype], (backend, dtype, activation, tensor_name, f"{error:.1e}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("g", [1, 3, 8, 16])
def test_output_and_every_gradient_are_those_of_the_oracle(backend: str, g: int) -> None:
    torch.manual_seed(g)
    for blocks, kind, gated in itertools.product((1, 6), ("even", "skewed", "none"), (True, False)):
        pairs = load(kind, blocks)
        for dtype, activation in (
            (torch.float64, Activation.SWIGLU),
            (torch.float32, Activation.GELU),
            (torch.float32, Activation.SWIGLU),
            (torch.float32, ClampedActivation(Activation.SWIGLU, clamp=2.0, offset=0.5)),
            (torch.bfloat16, Activation.SQUARED_RELU),
            (torch.float16, Activation.RELU),
        ):
            if backend == "grouped" and (dtype == torch.float64 or g % grouped.MULTIPLE):
                continue
            tensors = [
                torch.randn(R, D),
                torch.randn(blocks, g * activation.keys_per_cell, D) * D**-0.5,
                torch.randn(blocks, g, D),
            ] + ([torch.rand(len(pairs.rows))] if gated else [])
            assert_agree(backend, dtype, [t.double() for t in tensors], pairs, activation)


@pytest.mark.parametrize("backend", ["grouped", "masked", "bags"])
@pytest.mark.parametrize("scratch", [1, 3000])
def test_pieces_of_scratch_do_not_change_the_result(
    backend: str, scratch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    pairs = load("skewed", 9)
    tensors = [torch.randn(R, 192), torch.randn(9, 8, 192) / 14, torch.randn(9, 8, 192)]
    tensors = [tensor.double() for tensor in [*tensors, torch.rand(len(pairs.rows))]]
    module = {"grouped": grouped, "masked": masked, "bags": bags}[backend]
    monkeypatch.setattr(module, "SCRATCH_BYTES", scratch)
    if backend == "grouped":
        monkeypatch.setattr(grouped, "MOST_GROUPS", 2)
    assert_agree(backend, torch.float32, tensors, pairs, Activation.GELU)


@pytest.mark.parametrize("backend", ["masked", "bags", "torch"])
def test_values_without_keys_agree_with_the_oracle_when_a_row_has_a_cell_twice(
    backend: str,
) -> None:
    torch.manual_seed(0)
    rows = torch.arange(R, dtype=torch.int32).repeat_interleave(4)
    pairs = Pairs(rows=rows, blocks=torch.randint(7, (len(rows),), dtype=torch.int32))
    results = []
    for name in (backend, "naive"):
        torch.manual_seed(1)
        values = torch.randn(7, 1, D, dtype=torch.float64, requires_grad=True)
        gates = torch.randn(len(rows), dtype=torch.float64, requires_grad=True)
        x = torch.zeros(R, D, dtype=torch.float64)
        y = block_ffn_pairs(x, None, values, pairs, gates, backend=name)
        y.square().sum().backward()
        results.append([y.detach(), values.grad, gates.grad])
    for actual, exact in zip(*results, strict=True):
        torch.testing.assert_close(actual, exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", ["grouped", "masked", "bags", "torch"])
def test_gradients_of_tables_are_added_to_a_buffer(backend: str) -> None:
    torch.manual_seed(0)
    products = {"grouped": grouped, "masked": masked, "bags": bags}.get(backend)
    if products is None:
        from megatron_sffn.ops.block_ffn import torch_backend as products
    from megatron_sffn.ops.block_ffn.pairs import Sorted

    pairs = load("skewed", 5)
    order, offsets = products.sort(pairs.blocks, 5)
    by_block = Sorted(rows=pairs.rows[order], offsets=offsets, order=order)
    coefficients, rows = torch.randn(len(pairs.rows), 8), torch.randn(R, D)
    buffer = torch.randn(5, 8, D)
    expected = buffer + products.to_table(coefficients, rows, by_block)
    assert products.to_table(coefficients, rows, by_block, into=buffer) is buffer
    torch.testing.assert_close(buffer, expected)


def run_on_meta(backend: str) -> list[Tensor]:
    """Forward and backward with meta tensors: an error if the host reads a number."""
    cells = 1 if backend == "bags" else 8
    like = {"dtype": torch.bfloat16, "device": "meta", "requires_grad": True}
    x, keys, values = (torch.empty(*s, D, **like) for s in ([R], [6, cells], [6, cells]))
    ids = torch.empty(R * 2, dtype=torch.int32, device="meta")
    gates = torch.empty(R * 2, device="meta", requires_grad=True)
    y = block_ffn_pairs(x, keys, values, Pairs(rows=ids, blocks=ids), gates, backend=backend)
    y.backward(torch.empty_like(y))
    return [x, keys, values, gates]


@pytest.mark.parametrize("backend", ["grouped", "masked", "bags"])
def test_the_host_never_waits_for_a_gpu(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    simulate_gpu(monkeypatch)
    assert all(tensor.grad.shape == tensor.shape for tensor in run_on_meta(backend))
    with pytest.raises(RuntimeError, match="meta"):  # the loop reads where blocks begin
        run_on_meta("torch")
    monkeypatch.setattr(grouped, "MOST_GROUPS", 2)
    if backend == "grouped":
        with pytest.raises(RuntimeError, match="meta"):
            run_on_meta(backend)


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_the_branches_for_a_gpu_compute_the_same(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The branches for a GPU, with the CPU's operators."""
    simulate_gpu(monkeypatch)
    torch.manual_seed(0)
    pairs = load("skewed", 6)
    tensors = [torch.randn(R, D), torch.randn(6, 8, D) / 5, torch.randn(6, 8, D)]
    tensors = [tensor.double() for tensor in [*tensors, torch.rand(len(pairs.rows))]]
    assert_agree(backend, torch.bfloat16, tensors, pairs, Activation.GELU)


def test_a_row_that_is_not_finite_leaves_other_rows_unchanged() -> None:
    torch.manual_seed(0)
    x, keys, values = torch.randn(R, D), torch.randn(6, 3, D), torch.randn(6, 3, D)
    ids = torch.rand(R, 6).topk(2).indices
    results = []
    for number in (1.0, torch.nan, torch.inf):
        changed = x.clone()
        changed[5] = number
        changed.requires_grad_()
        y = block_ffn(changed, keys, values, ids, backend="masked")
        y.backward(changed.detach())
        results.append((y.detach(), changed.grad))
    other_rows = torch.arange(R) != 5
    for result in results[1:]:
        for actual, finite in zip(result, results[0], strict=True):
            assert torch.equal(actual[other_rows], finite[other_rows])


def test_grouped_refuses_unsupported_inputs_and_names_alternatives() -> None:
    x, table = torch.zeros(3, 16), torch.zeros(2, 8, 16)
    ids = torch.zeros(3, 1, dtype=torch.long)
    for tensors, words in (
        ((x, table[:, :4], table[:, :4]), "multiples of 8, and the cells of a block is 4"),
        ((x[:, :12], table[..., :12], table), "multiples of 8, and the width of keys is 12"),
        ((x.double(), table.double(), table.double()), "the tensors are torch.float64"),
        ((x, None, table[:, :1]), "needs keys"),
    ):
        gates = None if tensors[1] is not None else torch.ones(3, 1)
        with pytest.raises(ConfigError, match=words) as caught:
            block_ffn(*tensors, ids, gates, backend="grouped")
        assert str(caught.value).endswith("; use auto, masked or torch")
