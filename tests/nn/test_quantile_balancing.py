"""Quantile balancing on one rank: prices, the choice by them, the load, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.distributed.finalize_model_grads import (
    _update_router_qb_beta,
    reset_model_temporary_tensors,
)
from megatron.core.transformer.moe.moe_utils import qb_dual_update
from torch import Tensor

from megatron_sffn.nn import quantile_balancing
from megatron_sffn.nn.config import RouterConfig
from megatron_sffn.nn.expert_grid import OneRankGroup
from megatron_sffn.nn.layer import SparseFFN
from megatron_sffn.nn.quantile_balancing import QUANTILE_BALANCING, balancing_prices
from megatron_sffn.nn.routers.avg_k import AvgKConfig
from megatron_sffn.nn.routers.s_base import SBaseConfig
from megatron_sffn.nn.routers.sigma_moe import SigmaMoEConfig
from megatron_sffn.nn.routers.vanilla_m import VanillaMConfig
from megatron_sffn.ops import route_topk
from megatron_sffn.utils.errors import ConfigError
from tests.nn.routers.conftest import transformer

pytestmark = pytest.mark.usefixtures("one_rank")

T, B, K, D = 18, 12, 4, 6
PRICED = {"moe_router_load_balancing_type": QUANTILE_BALANCING}
SCORED = {"avg-k": AvgKConfig, "vanilla-m": VanillaMConfig, "sigma-moe": SigmaMoEConfig}


def priced_layer(router: RouterConfig, **numbers: Any) -> SparseFFN:
    """A layer of 12 blocks, 4 of them active, in training mode."""
    layer = SparseFFN(transformer(router, **PRICED, **numbers), layer_number=1)
    return layer.train()


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("tokens", [T, 15, 2])
def test_a_price_is_exceeded_by_the_even_share_of_tokens(tokens: int) -> None:
    scores, prices = draw(tokens, B), draw(B, seed=1)
    thresholds = (scores - prices).sort(dim=1, descending=True).values[:, K]
    above = (scores - thresholds[:, None]).sort(dim=0, descending=True).values
    actual = balancing_prices(scores, prices, K, OneRankGroup())
    assert torch.equal(actual, above[tokens * K // B])


def test_prices_are_those_of_megatron(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, prices = draw(T, B).float(), draw(B, seed=1).float()
    ids, expected = qb_dual_update(scores, K, prices)
    for numbers in (1, 5 * T, 1 << 24):  # blocks in chunks of 1, 5 and all
        monkeypatch.setattr(quantile_balancing, "SCRATCH_NUMBERS", numbers)
        assert torch.equal(balancing_prices(scores, prices, K, OneRankGroup()), expected)
    assert torch.equal(route_topk(scores - prices, K).sort().values, ids.sort().values)


@pytest.mark.parametrize("gate", ["none", "sigmoid", "softmax-chosen"])
def test_prices_act_on_the_choice_alone(gate: str) -> None:
    layer = priced_layer(AvgKConfig(gate=gate))
    router, x = layer.router, draw(T, D)
    plain = SparseFFN(transformer(AvgKConfig(gate=gate)), layer_number=1).router
    before = router(x, layer.experts.keys)
    assert torch.equal(before.block_ids, plain(x, layer.experts.keys).block_ids)
    router.balance.qb_beta.copy_(draw(B, seed=2))
    scores = router.score(x, x, layer.experts.keys)
    for module in (router.train(), router.eval()):  # the model was trained with this choice
        routing = module(x, layer.experts.keys)
        assert torch.equal(routing.block_ids, route_topk(scores - router.balance.qb_beta, K))
        torch.testing.assert_close(routing.scores, scores.gather(1, routing.block_ids))
    assert not torch.equal(routing.block_ids, before.block_ids)
    if gate == "sigmoid":
        torch.testing.assert_close(routing.gates, routing.scores.sigmoid())


def test_prices_are_added_up_once_per_training_microbatch() -> None:
    layer = priced_layer(SigmaMoEConfig(block_dropout=0.5))
    balance, expected = layer.router.balance, torch.zeros(B)
    for seed in range(2):
        x = draw(T, D, seed=seed)
        with torch.no_grad():
            layer.router(x, layer.experts.keys)  # the first pass of a recomputed layer
        layer.router(x, layer.experts.keys)
        # Block dropout does not act on the prices.
        scores = layer.router.score(x, x, layer.experts.keys).detach()
        expected += balancing_prices(scores, torch.zeros(B), K, OneRankGroup())
    layer.eval()
    layer.router(x, layer.experts.keys)
    torch.testing.assert_close(balance.qb_beta_accum, expected)
    assert balance.qb_beta_count == 2 and not balance.qb_beta.any()


@pytest.mark.parametrize("ema", [0.0, 0.75])
def test_megatron_moves_the_prices_at_the_end_of_a_step(ema: float) -> None:
    layer = priced_layer(AvgKConfig(), moe_router_quantile_balancing_ema=ema)
    balance, world = layer.router.balance, torch.distributed.group.WORLD
    former = draw(B, seed=3).float()
    balance.qb_beta.copy_(former)
    for seed in range(2):
        layer.router(draw(T, D, seed=seed), layer.experts.keys)
    expected = ema * former + (1 - ema) * balance.qb_beta_accum / 2
    _update_router_qb_beta([layer], layer.config, world)
    reset_model_temporary_tensors(layer.config, [layer])
    torch.testing.assert_close(balance.qb_beta, expected - expected.mean())
    assert not balance.qb_beta_accum.any() and balance.qb_beta_count == 0


@pytest.mark.parametrize("router", SCORED)
def test_the_load_becomes_even(router: str) -> None:
    tokens, steps = 600, 12
    layer = priced_layer(SCORED[router](), moe_router_quantile_balancing_ema=0.5)
    world, offset = torch.distributed.group.WORLD, 2 * draw(D, seed=9)
    loads = []
    for step in range(steps):
        # Tokens with a common direction, so that some blocks have the best score for most.
        routing = layer.router(draw(tokens, D, seed=step) + offset, layer.experts.keys)
        counts = torch.bincount(routing.block_ids.flatten(), minlength=B)
        loads.append(float(counts.max() * B / counts.sum()))
        _update_router_qb_beta([layer], layer.config, world)
        reset_model_temporary_tensors(layer.config, [layer])
    assert loads[0] > 1.8 and loads[-1] < 1.25, loads


def test_prices_stay_in_fp32_and_are_saved_without_their_sums() -> None:
    router = priced_layer(AvgKConfig()).router.bfloat16()
    for module in router.modules():
        if hasattr(module, "_maintain_float32_expert_bias"):
            module._maintain_float32_expert_bias()
    assert {buffer.dtype for buffer in router.buffers()} == {torch.float32}
    assert set(router.state_dict()) == {"balance.qb_beta"}


@pytest.mark.parametrize(
    ("router", "numbers", "sentence"),
    [
        (AvgKConfig(), {"moe_aux_loss_coeff": 0.1}, "not work together with --moe-aux-loss-coeff"),
        (
            AvgKConfig(),
            {"moe_router_enable_expert_bias": True},
            "not work together with --moe-router-enable-expert-bias; leave one",
        ),
        (
            AvgKConfig(),
            {"moe_router_num_groups": 3, "moe_router_group_topk": 2},
            "not work together with --moe-router-num-groups; leave one",
        ),
        (AvgKConfig(), {"expansion": 1}, "nothing to balance where all 4 blocks are active"),
        (
            AvgKConfig(),
            {"moe_router_quantile_balancing_ema": 1.0},
            "--moe-router-quantile-balancing-ema 1.0 is not at least 0 and below 1",
        ),
        (
            AvgKConfig(),
            {
                "moe_router_load_balancing_type": [QUANTILE_BALANCING, "aux_loss"],
                "moe_aux_loss_coeff": [0.0, 0.1],
            },
            "balances without any loss; give it alone",
        ),
        (SBaseConfig(), {}, "nothing to balance with --sffn-router s-base"),
    ],
)
def test_what_it_cannot_be_combined_with_is_refused(
    router: RouterConfig, numbers: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        transformer(router, **{**PRICED, **numbers})
