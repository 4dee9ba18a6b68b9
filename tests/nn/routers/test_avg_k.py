"""Avg-K (methods A1-A8)."""

import pytest
import torch
import torch.nn.functional as F

from megatron_sffn.nn.layer import SparseFFN
from megatron_sffn.nn.routers.avg_k import AvgKConfig
from megatron_sffn.nn.routers.vanilla_m import VanillaMConfig
from megatron_sffn.ops import block_ffn, route_topk
from tests.nn.routers.conftest import B, T, tables, transformer
from tests.support import router_cases
from tests.support.ranks import run_ranks


def test_a1_the_score_is_the_mean_pre_activation(build) -> None:
    x, keys, _ = tables()
    scores = x @ build(AvgKConfig())._descriptors(keys).T
    torch.testing.assert_close(
        scores, torch.stack([x @ k.mean(0) for k in keys], 1), rtol=1e-10, atol=1e-12
    )
    torch.testing.assert_close(
        scores, torch.stack([(x @ k.T).mean(1) for k in keys], 1), rtol=1e-10, atol=1e-12
    )
    routing = build(AvgKConfig())(x, keys, None)
    assert torch.equal(routing.block_ids, route_topk(scores, 4))
    assert routing.gates is None


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_a2_single_cells_are_vanilla_m(build, activation: str) -> None:
    x, keys, values = tables(blocks=24, cells=1)
    numbers = {
        "block_size": 1,
        "active_cells": 12,
        "expansion": 2,
        "activation_func": getattr(F, activation),
    }
    ys = []
    for config in (AvgKConfig(), VanillaMConfig()):
        ids = build(config, **numbers)(x, keys, None).block_ids
        ys.append(block_ffn(x, keys, values, ids, activation=activation))
    # GELU is not monotone below 0: the two agree where 12 cells are positive.
    enough = ((x @ keys[:, 0].T) > 0).sum(1) >= 12
    assert 0 < enough.sum() < T
    compared = enough if activation == "gelu" else torch.ones_like(enough)
    torch.testing.assert_close(ys[0][compared], ys[1][compared], rtol=1e-10, atol=1e-12)


def test_a3_the_state_has_the_block_weights_only(one_rank: None) -> None:
    layer = SparseFFN(transformer(AvgKConfig()), layer_number=1)
    assert set(layer.state_dict()) == {"experts.keys", "experts.values"}


def test_a4_the_selection_carries_no_gradient(build) -> None:
    x, keys, values = (t.requires_grad_() for t in tables())
    ids = build(AvgKConfig())(x, keys, None).block_ids
    grads = []
    for chosen in (ids, ids.detach().clone()):
        y = block_ffn(x, keys, values, chosen)
        grads.append(torch.autograd.grad(y.square().sum(), (x, keys, values)))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a5_the_next_forward_uses_the_new_keys(build) -> None:
    x, keys, _ = tables()
    router = build(AvgKConfig())
    before = router(x, keys, None).block_ids
    with torch.no_grad():
        keys.neg_()
    after = router(x, keys, None).block_ids
    assert not torch.equal(before, after)
    assert torch.equal(after, build(AvgKConfig())(x, keys, None).block_ids)


def test_a5_descriptors_are_computed_once_for_a_version_of_the_weights(build, monkeypatch) -> None:
    x, keys, _ = tables()
    router = build(AvgKConfig())
    calls = []
    compute = router.descriptor.forward
    counting = lambda keys, layer: calls.append(1) or compute(keys, layer)  # noqa: E731
    monkeypatch.setattr(router.descriptor, "forward", counting)
    for version, computed in ((0, 1), (0, 1), (1, 2), (1, 2), (None, 3), (None, 4), (1, 4)):
        router.weights_version = version
        router(x, keys, None)
        assert len(calls) == computed, version
    with torch.no_grad():
        keys.neg_()
    router.weights_version = 2
    assert torch.equal(router(x, keys, None).block_ids, route_topk(x @ keys.mean(1).T, 4))


def test_a5_a_differentiated_descriptor_is_never_cached(build) -> None:
    x, keys, _ = tables()
    keys.requires_grad_()
    router = build(AvgKConfig(gate="sigmoid"))
    router.weights_version = 0
    for _ in range(2):  # a kept graph could not be walked twice
        (grad,) = torch.autograd.grad(router(x, keys, None).gates.sum(), keys)
        assert grad.abs().sum() > 0


def test_a6_scaling_all_keys_keeps_the_selection(build) -> None:
    x, keys, _ = tables()
    router = build(AvgKConfig())
    assert torch.equal(router(x, keys, None).block_ids, router(x, 16 * keys, None).block_ids)


def test_a8_ties_go_to_the_lowest_block(build) -> None:
    x, keys, _ = tables()
    equal_keys = keys[:1].expand(B, -1, -1).contiguous()
    assert (build(AvgKConfig())(x, equal_keys, None).block_ids == torch.arange(4)).all()


def tied_choice() -> torch.Tensor:
    """Blocks that this rank chooses among equal ones, some of which other ranks hold."""
    layer = router_cases.build(router_cases.Case(router="avg-k"))
    with torch.no_grad():
        layer.experts.keys.copy_(layer.experts.keys[:1, :1].sign().expand_as(layer.experts.keys))
        torch.distributed.broadcast(layer.experts.keys, src=0)
    x = router_cases.draw(7, 5, router_cases.D)
    return layer.router(x, layer.experts.keys).block_ids


@pytest.mark.parametrize(("ranks", "expert", "cells"), [(1, 1, 1), (4, 4, 1), (4, 2, 2)])
def test_a8_ties_go_to_the_lowest_block_on_every_rank(ranks: int, expert: int, cells: int) -> None:
    groups = {"expert_model_parallel_size": expert, "expert_tensor_parallel_size": cells}
    for chosen in run_ranks(ranks, tied_choice, **groups):
        assert (chosen == torch.arange(4)).all()


def test_swiglu_averages_the_gate_keys(build) -> None:
    x, gate_keys, up_keys = tables()
    keys = torch.cat((gate_keys, up_keys), dim=1)
    router = build(AvgKConfig(), activation_func=F.silu, gated_linear_unit=True)
    expected = route_topk(x @ gate_keys.mean(1).T, 4)
    assert torch.equal(router(x, keys, None).block_ids, expected)


def test_half_precision_scores_are_summed_in_fp32(build) -> None:
    x, keys, _ = tables()
    ids = build(AvgKConfig())(x.bfloat16(), keys.bfloat16(), None).block_ids
    exact = x.bfloat16().double() @ keys.bfloat16().double().mean(1).T
    assert torch.equal(ids, route_topk(exact, 4))
