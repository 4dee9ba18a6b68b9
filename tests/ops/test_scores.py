"""Scores on tensor cores: half-precision operands, as precise as fp32 products."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_sffn.ops.scores import naive, op, scores
from tests.support.cuda_operators import CUDA_OPERATORS
from tests.support.simulated_gpu import simulate_gpu

T, B, D = 37, 19, 250
HALF = [torch.bfloat16, torch.float16]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate the arithmetic of a GPU on the CPU."""
    assert CUDA_OPERATORS
    simulate_gpu(monkeypatch)


def operands(x_dtype: torch.dtype, weight_dtype: torch.dtype, scale: float = 1.0) -> list[Tensor]:
    """Tokens, weights, and a gradient of the scores."""
    torch.manual_seed(0)
    x, weight, grad = torch.randn(T, D), torch.randn(B, D) * scale, torch.randn(T, B)
    return [
        x.to(x_dtype).requires_grad_(),
        weight.to(weight_dtype).requires_grad_(),
        grad.to(torch.promote_types(x_dtype, torch.float32)),
    ]


def results(compute, x: Tensor, weight: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """The scores and both gradients."""
    result = compute(x, weight)
    dx, dweight = torch.autograd.grad(result, (x, weight), grad)
    return {"scores": result.detach(), "dx": dx, "dweight": dweight}


def exact(x: Tensor, weight: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """The scores and both gradients in fp64."""
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    return results(naive.scores, *wide, grad.double())


def error(value: Tensor, expected: Tensor) -> float:
    """The largest error over the largest number."""
    return float((value.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_operands_are_as_precise_as_fp32(dtype: torch.dtype) -> None:
    inputs = operands(dtype, dtype)
    assert op.tensor_core_dtype(*inputs[:2]) is dtype
    actual, expected = results(scores, *inputs), exact(*inputs)
    assert actual["scores"].dtype is torch.float32
    assert error(actual["scores"], expected["scores"]) < 1e-6
    for name in ("dx", "dweight"):
        # One rounding to the gradient's dtype.
        assert actual[name].dtype is dtype
        assert error(actual[name], expected[name]) < torch.finfo(dtype).eps


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("scale", [1.0, 1e-4])
@pytest.mark.parametrize("dtype", HALF)
def test_fp32_weights_are_split_in_two_terms(dtype: torch.dtype, scale: float) -> None:
    inputs = operands(dtype, torch.float32, scale)
    actual, expected = results(scores, *inputs), exact(*inputs)
    rounded = naive.scores(inputs[0], inputs[1].to(dtype)).detach()
    # In fp16 the terms leave 2^-23, and the fp32 sums themselves more.
    two_terms = {torch.bfloat16: 2.0**-17, torch.float16: 2.0**-20}[dtype]
    assert error(actual["scores"], expected["scores"]) < two_terms
    assert error(actual["scores"], expected["scores"]) < error(rounded, expected["scores"]) / 50
    assert actual["dweight"].dtype is torch.float32
    assert error(actual["dweight"], expected["dweight"]) < two_terms
    assert error(actual["dx"], expected["dx"]) < torch.finfo(dtype).eps


@pytest.mark.usefixtures("gpu")
def test_fp32_tokens_are_precise_with_half_precision_weights() -> None:
    inputs = operands(torch.float32, torch.bfloat16)
    actual, expected = results(scores, *inputs), exact(*inputs)
    assert error(actual["scores"], expected["scores"]) < 2.0**-17


@pytest.mark.usefixtures("gpu")
def test_terms_of_zeros_are_zeros() -> None:
    for term, factor in op.terms(torch.zeros(3, 2), torch.float16):
        assert not term.any() and torch.isfinite(torch.as_tensor(factor))


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_operands_are_multiplied_as_they_are(dtype: torch.dtype) -> None:
    inputs = operands(dtype, dtype)
    assert op.tensor_core_dtype(*inputs[:2]) is None
    actual, expected = results(scores, *inputs), results(naive.scores, *inputs)
    assert all(torch.equal(actual[name], expected[name]) for name in actual)


@pytest.mark.parametrize("dtype", HALF)
def test_a_cpu_uses_the_oracle(dtype: torch.dtype) -> None:
    inputs = operands(dtype, torch.float32)
    assert torch.equal(scores(*inputs[:2]), naive.scores(*inputs[:2]))


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float32),
    ],
)
def test_the_host_never_waits(dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    # Fake tensors raise an error if the host reads a number. `meta` stands for the GPU: torch's
    # backward pass asks the driver for the streams of a CUDA device.
    with FakeTensorMode(allow_non_fake_inputs=False):
        x = torch.empty(T, D, dtype=dtype, device="meta", requires_grad=True)
        weight = torch.empty(B, D, dtype=weight_dtype, device="meta", requires_grad=True)
        result = scores(x, weight)
        result.sum().backward()
    assert (result.shape, result.dtype, result.device.type) == ((T, B), torch.float32, "meta")
    assert x.grad.dtype is dtype and weight.grad.dtype is weight_dtype
