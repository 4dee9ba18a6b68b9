"""The plain functions of Mamba and gated delta nets, token by token and against Megatron's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from megatron.core.ssm.gated_delta_net import torch_chunk_gated_delta_rule
from torch import Tensor

from megatron_sffn.patches import recurrence

LENGTHS = [1, 16, 37]
"""Tokens: fewer than a chunk of 16, one chunk, and two and a part."""


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def assert_same_with_gradients(
    actual: Tensor, expected: Tensor, inputs: tuple[Tensor, ...]
) -> None:
    torch.testing.assert_close(actual, expected)
    weights = torch.randn_like(expected)
    gradients = (torch.autograd.grad(tensor, inputs, weights) for tensor in (actual, expected))
    for gradient, expected_gradient in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("length", LENGTHS)
def test_mambas_scan_is_the_recurrence_token_by_token(length: int) -> None:
    torch.manual_seed(1)
    heads, width, groups, states = 4, 3, 2, 5
    channels = heads * width + 2 * groups * states
    projected = draw(2, length, heads * width + channels + heads)
    weight, bias, step_bias, direct = draw(channels, 4), draw(channels), draw(heads), draw(heads)
    decay = (-draw(heads).detach().exp()).requires_grad_()
    gate, convolved, steps = projected.split([heads * width, channels, heads], dim=-1)
    padded = F.pad(convolved, (0, 0, 3, 0))
    convolved = sum(padded[:, i : i + length] * weight[:, i] for i in range(4)) + bias
    inputs, *projections = F.silu(convolved).split(
        [heads * width, groups * states, groups * states], dim=-1
    )
    inputs = inputs.view(2, length, heads, width)
    keys, queries = (
        tensor.view(2, length, groups, states)[:, :, [0, 0, 1, 1]] for tensor in projections
    )
    steps, state, outputs = F.softplus(steps + step_bias), torch.zeros(2, heads, width, states), []
    for t in range(length):
        step = steps[:, t, :, None, None]
        state = state * (step[..., 0, 0] * decay).exp()[..., None, None]
        state = state + step * inputs[:, t, :, :, None] * keys[:, t, :, None]
        outputs.append((state @ queries[:, t, :, :, None])[..., 0] + direct[:, None] * inputs[:, t])
    expected = torch.stack(outputs, dim=1).flatten(2) * F.silu(gate)
    parameters = (weight, bias, step_bias, decay, direct)
    actual = recurrence.split_conv_scan(
        projected,
        *parameters,
        chunk_size=16,
        activation="silu",
        headdim=width,
        ngroups=groups,
        norm_before_gate=False,
        seq_idx=None,
    )
    assert_same_with_gradients(actual, expected, (projected, *parameters))


@pytest.mark.parametrize("length", LENGTHS)
def test_the_gated_delta_rule_is_the_recurrence_token_by_token(length: int) -> None:
    torch.manual_seed(1)
    heads, key_width, value_width = 3, 4, 5
    queries, values = draw(2, length, heads, key_width), draw(2, length, heads, value_width)
    keys = F.normalize(draw(2, length, heads, key_width).detach(), dim=-1).requires_grad_()
    g = (-torch.rand(2, length, heads, dtype=torch.float64)).requires_grad_()
    beta = torch.rand(2, length, heads, dtype=torch.float64).requires_grad_()
    state, outputs = torch.zeros(2, heads, key_width, value_width, dtype=torch.float64), []
    for t in range(length):
        state = state * g[:, t].exp()[..., None, None]
        read = (keys[:, t, :, :, None] * state).sum(dim=-2)
        written = beta[:, t, :, None] * (values[:, t] - read)
        state = state + keys[:, t, :, :, None] * written[:, :, None]
        outputs.append((queries[:, t, :, :, None] * state).sum(dim=-2) / key_width**0.5)
    inputs = (queries, keys, values, g, beta)
    options = {"cu_seqlens": None, "use_qk_l2norm_in_kernel": False}
    actual, _ = recurrence.gated_delta_rule(*inputs, chunk_size=16, **options)
    assert_same_with_gradients(actual, torch.stack(outputs, dim=1), inputs)
    megatrons, _ = torch_chunk_gated_delta_rule(*inputs, chunk_size=16)
    torch.testing.assert_close(megatrons, actual, rtol=1e-4, atol=1e-5)


def test_the_norm_of_a_mamba_layer_is_by_group() -> None:
    norm, x = recurrence.GroupedRMSNorm(6, 1e-5, 3, False), torch.randn(4, 6)
    norm.weight.data = torch.arange(6.0)
    groups = x.view(4, 2, 3)
    expected = groups / (groups.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(norm(x), expected.view(4, 6) * torch.arange(6.0))
