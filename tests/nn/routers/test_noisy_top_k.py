"""Noisy top-K gating: noise in training alone, by its formula, and the start at zero."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_sffn.nn.routers.noisy_top_k import NoisyTopKConfig
from megatron_sffn.ops import route_topk
from tests.nn.routers.conftest import B, T, tables

CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def filled(router):
    torch.manual_seed(4)
    with torch.no_grad():
        for weight in router.parameters():
            weight.normal_()
    return router


@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_the_noise_is_normal_times_a_softplus(build, factor: float) -> None:
    x, keys, _ = tables()
    router = filled(build(NoisyTopKConfig(noise=factor)))
    torch.manual_seed(1)
    n = torch.randn(T, B, dtype=torch.float64)
    torch.manual_seed(1)
    spread = (1 + (x @ router.noise_weight.T).exp()).log()
    expected = x @ router.weight.T + factor * n * spread
    torch.testing.assert_close(router.score(x, x, keys), expected, **CLOSE)


def test_evaluation_has_no_noise_and_the_gate_is_a_softmax_over_the_chosen(build) -> None:
    x, keys, _ = tables()
    router = filled(build(NoisyTopKConfig())).eval()
    first, second = (router(x, keys) for _ in range(2))
    scores = x @ router.weight.T
    ids = route_topk(scores, 4)
    assert torch.equal(first.block_ids, ids) and torch.equal(second.block_ids, ids)
    torch.testing.assert_close(first.gates, scores.gather(1, ids).softmax(1), **CLOSE)


def test_training_draws_anew_and_gates_by_the_noisy_scores(build) -> None:
    x, keys, _ = tables()
    router = filled(build(NoisyTopKConfig()))
    first, second = (router(x, keys) for _ in range(2))
    assert not torch.equal(first.block_ids, second.block_ids)
    torch.testing.assert_close(first.gates, first.scores.softmax(1), **CLOSE)
    ones = torch.ones(T, dtype=torch.float64)
    torch.testing.assert_close(first.gates.sum(1), ones, **CLOSE)


def test_weights_start_at_zero_so_that_the_noise_alone_decides(build) -> None:
    x, keys, _ = tables()
    router = build(NoisyTopKConfig())
    assert all((weight == 0).all() for weight in router.parameters())
    torch.manual_seed(1)
    n = torch.randn(T, B, dtype=torch.float64)
    torch.manual_seed(1)
    ids = router(x, keys).block_ids
    assert torch.equal(ids, route_topk(n * F.softplus(torch.zeros(1).double()), 4))
    chosen = torch.cat([router(x, keys).block_ids for _ in range(200)]).flatten()
    counts = torch.bincount(chosen, minlength=B).double()
    expected = len(chosen) / B
    assert ((counts - expected).abs() < 5 * expected**0.5).all()


def test_only_the_last_layer_of_a_network_starts_at_zero(build) -> None:
    router = build(NoisyTopKConfig(network="mlp"))
    assert (router.weight == 0).all() and (router.noise_weight == 0).all()
    assert router.hidden.std() > 0


def test_both_weights_learn(build) -> None:
    x, keys, _ = tables()
    router = build(NoisyTopKConfig())
    router(x, keys).gates.square().sum().backward()
    assert all(weight.grad.abs().sum() > 0 for weight in router.parameters())
    without_noise = build(NoisyTopKConfig(noise=0.0))
    without_noise(x, keys).gates.square().sum().backward()
    assert (without_noise.noise_weight.grad == 0).all()


def test_the_load_balancing_loss_has_the_coefficient_of_switch() -> None:
    assert NoisyTopKConfig.balance_coefficient == 0.01
