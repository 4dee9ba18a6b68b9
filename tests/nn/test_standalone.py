"""The layer in a plain PyTorch model: what it computes, what a step's end does, what it refuses."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from megatron_sffn import SparseFFNConfig, SparseFFNTransformerConfig, StandaloneSparseFFN
from megatron_sffn.nn.expert_grid import one_rank_groups
from megatron_sffn.nn.layer import SparseFFN
from megatron_sffn.nn.routers import ROUTERS
from megatron_sffn.nn.routers.avg_k import AvgKConfig
from megatron_sffn.nn.standalone import finish_step
from megatron_sffn.utils.errors import ConfigError
from tests.support.router_cases import SPARSE

D = 32


def layer_of(router: str = "avg-k", **arguments) -> StandaloneSparseFFN:
    test_numbers = ROUTERS[router].test_numbers
    sffn = SparseFFNConfig(
        active_cells=16,
        router=ROUTERS[router](**test_numbers.options),
        block_size=1 if test_numbers.single_cells else 4,
        expansion=4,
        backend="torch",
    )
    return StandaloneSparseFFN(D, sffn, **arguments)


@pytest.mark.parametrize("router", SPARSE)
def test_every_router_trains_without_process_groups(router):
    layer = layer_of(router, activation="relu" if router == "pkm-relu" else "gelu", vocab_size=50)
    x = torch.randn(2, 5, D, requires_grad=True)
    y = layer(x, torch.randint(50, (2, 5)))
    assert y.shape == x.shape and y.isfinite().all() and y.abs().sum() > 0
    y.sum().backward()
    finish_step(layer)
    assert x.grad.abs().sum() > 0
    assert layer.ffn.experts.values.grad.abs().sum() > 0
    assert not torch.distributed.is_initialized()


def test_the_layer_is_that_of_a_megatron_model_batch_first():
    layer = layer_of(layer_number=2, num_layers=3)
    config = SparseFFNTransformerConfig(
        num_layers=3, hidden_size=D, num_attention_heads=4, sffn=layer.ffn.config.sffn
    )
    megatrons = SparseFFN(config, 2, one_rank_groups())
    x = torch.randn(2, 5, D)
    expected = megatrons(x.transpose(0, 1))[0].transpose(0, 1)
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer(x[0]), layer(x[:1])[0])
    torch.testing.assert_close(layer(x[0, 0]), layer(x)[0, 0])
    assert not torch.equal(layer(x), layer_of(layer_number=1, num_layers=3)(x))
    assert layer.state_dict().keys() >= {"ffn.experts.keys", "ffn.experts.values"}


def test_the_end_of_a_step_moves_the_expert_bias_against_the_load():
    balance = {
        "moe_router_load_balancing_type": "global_aux_loss",
        "moe_aux_loss_coeff": 0.01,
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 0.5,
    }
    model = nn.Sequential(layer_of("softmax-after", **balance)).to(torch.bfloat16)
    (layer,) = model
    balance = layer.ffn.router.balance
    assert balance.expert_bias.dtype == torch.float32
    model(torch.randn(3, 7, D, dtype=torch.bfloat16)).float().sum().backward()
    counts = balance.local_tokens_per_expert.clone()
    assert counts.sum() == 3 * 7 * 4 and balance.tokens_of_step.sum() > 0
    finish_step(model)
    assert torch.equal(balance.expert_bias, torch.sign(counts.mean() - counts) * 0.5)
    assert not balance.local_tokens_per_expert.any() and not balance.tokens_of_step.any()
    assert layer.auxiliary_losses()["global_load_balancing_loss"] >= 0
    assert layer.auxiliary_losses() == {}


def test_the_end_of_a_step_moves_the_prices_of_quantile_balancing_as_megatron_does():
    fields = {
        "moe_router_load_balancing_type": "quantile_balancing",
        "moe_router_quantile_balancing_ema": 0.25,
    }
    layer = layer_of("avg-k", **fields)
    balance = layer.ffn.router.balance
    balance.qb_beta.copy_(torch.linspace(-1, 1, len(balance.qb_beta)))
    for seed in range(2):
        layer(torch.randn(3, 7, D, generator=torch.Generator().manual_seed(seed)))
    prices = 0.25 * balance.qb_beta + 0.75 * balance.qb_beta_accum / 2
    finish_step(layer)
    torch.testing.assert_close(balance.qb_beta, prices - prices.mean())
    assert not balance.qb_beta_accum.any() and not balance.qb_beta_count


def test_the_backward_pass_adds_the_gradient_of_the_auxiliary_loss():
    layer = layer_of("switch", moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=1.0)
    (0 * layer(torch.randn(4, 6, D)).sum()).backward()
    assert any(p.grad.abs().sum() > 0 for p in layer.ffn.router.parameters())


def test_counters_move_with_the_layer():
    layer = layer_of().to("meta")
    assert layer.ffn.router.score_flag.is_meta and layer.ffn.trained.sums.is_meta
    assert layer.ffn.trained.sums.dtype == torch.float64


@pytest.mark.parametrize(
    ("sffn", "arguments", "message"),
    [
        ({"shared_blocks": 1}, {}, "shared_blocks=1 needs Megatron's process groups"),
        ({"backend": "megatron"}, {}, "backend='megatron' needs Megatron's process groups"),
        ({"layers_per_table": 2}, {}, "layers_per_table=2 is about the layers of a model"),
        ({"router": ROUTERS["dense"]()}, {}, "dense is Megatron's own MLP"),
        ({}, {"activation": "tanh"}, "activation='tanh' is unknown; choose from gelu, relu"),
        ({}, {"layer_number": 2}, "layer_number=2 is not from 1 to num_layers=1"),
    ],
)
def test_what_only_megatrons_loop_has_is_refused(sffn, arguments, message):
    numbers = {"active_cells": 16, "block_size": 4, "expansion": 4, "router": AvgKConfig()}
    with pytest.raises(ConfigError, match=re.escape(message)):
        StandaloneSparseFFN(D, SparseFFNConfig(**numbers | sffn), **arguments)


def test_rand_hash_without_token_ids_is_refused():
    with pytest.raises(ConfigError, match=r"call the layer as layer\(x, token_ids\)"):
        layer_of("rand-hash")(torch.randn(2, 5, D))
