"""LoRKM (method P4), and top-K activation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_sffn.nn.layer import SparseFFN
from megatron_sffn.nn.routers.lorkm import LoRKMConfig
from megatron_sffn.nn.routers.top_k_act import TopKActConfig
from megatron_sffn.nn.routers.vanilla_m import AGGREGATORS, VanillaMConfig
from megatron_sffn.utils.errors import ConfigError
from tests.nn.routers.conftest import D, T, transformer

CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def filled(config, **numbers) -> SparseFFN:
    layer = SparseFFN(transformer(config, **numbers), layer_number=1)
    torch.manual_seed(2)
    with torch.no_grad():
        for weight in layer.experts.parameters():
            weight.normal_()
    return layer


@pytest.mark.parametrize("aggregator", AGGREGATORS)
@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("g", [1, 4])
def test_p4_lorkm_with_an_identity_projection_is_vanilla_m(
    one_rank: None, g: int, swiglu: bool, aggregator: str
) -> None:
    numbers = {"block_size": g}
    if swiglu:
        numbers |= {"activation_func": F.silu, "gated_linear_unit": True}
    lorkm = filled(LoRKMConfig(rank=D, aggregator=aggregator), **numbers)
    vanilla_m = filled(VanillaMConfig(aggregator=aggregator), **numbers)
    with torch.no_grad():
        lorkm.router.down.copy_(torch.eye(D))
    results = []
    for layer in (lorkm, vanilla_m):
        x = torch.randn(T, 1, D, generator=torch.Generator().manual_seed(1)).double()
        x.requires_grad_()
        y, _ = layer(x)
        y.square().sum().backward()
        results.append([y, x.grad, layer.experts.keys.grad, layer.experts.values.grad])
        results[-1].append(layer.router(x[:, 0], layer.experts.keys).block_ids)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_keys_have_the_rank_and_the_projection_learns_through_them(one_rank: None) -> None:
    layer = filled(LoRKMConfig(rank=3))
    assert layer.experts.keys.shape == (12, 2, 3)
    assert layer.experts.values.shape == (12, 2, D)
    assert layer.router.down.shape == (3, D)
    layer(torch.randn(T, 1, D).double())[0].square().sum().backward()
    assert layer.router.down.grad.abs().min() > 0


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_top_k_activation_keeps_the_largest_activations(one_rank: None, activation: str) -> None:
    f = getattr(F, activation)
    layer = filled(TopKActConfig(), block_size=1, activation_func=f)
    x = torch.randn(T, D).double()
    keys, values = (table[:, 0] for table in layer.experts())
    coefficients = f(x @ keys.T)
    # All other activations become zero. Some of GELU's are negative, so the test keeps by rank.
    threshold = coefficients.sort(dim=1, descending=True).values[:, 7:8]
    largest = coefficients * (coefficients >= threshold)
    torch.testing.assert_close(layer(x[:, None])[0][:, 0], largest @ values, **CLOSE)
    vanilla_m = filled(VanillaMConfig(), block_size=1, activation_func=f)
    torch.testing.assert_close(vanilla_m(x[:, None])[0], layer(x[:, None])[0], **CLOSE)


def test_top_k_activation_has_blocks_of_one_cell() -> None:
    with pytest.raises(ConfigError, match="not --sffn-block-size 2; use --sffn-block-size 1"):
        transformer(TopKActConfig())
