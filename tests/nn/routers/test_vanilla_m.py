"""VanillaM (methods V1-V4)."""

import pytest
import torch
import torch.nn.functional as F

from megatron_sffn.nn.routers import vanilla_m
from megatron_sffn.nn.routers.avg_k import AvgKConfig
from megatron_sffn.nn.routers.vanilla_m import AGGREGATORS, VanillaMConfig
from megatron_sffn.ops import block_ffn, route_topk
from tests.nn.routers.conftest import G, T, tables


def test_v1_all_single_cells_are_the_dense_ffn(build) -> None:
    x, keys, values = tables(blocks=24, cells=1)
    router = build(VanillaMConfig(), block_size=1, active_cells=24, expansion=1)
    y = block_ffn(x, keys, values, router(x, keys, None).block_ids)
    dense = F.gelu(x @ keys[:, 0].T) @ values[:, 0]
    torch.testing.assert_close(y, dense, rtol=1e-10, atol=1e-12)


def test_v2_the_score_is_the_mean_of_post_activations(build) -> None:
    x, keys, _ = tables()
    post = F.gelu(torch.einsum("td,bgd->tbg", x, keys)).mean(2)
    assert torch.equal(build(VanillaMConfig())(x, keys, None).block_ids, route_topk(post, 4))


def test_v2_without_a_nonlinearity_the_router_chooses_the_blocks_of_avg_k(
    build, monkeypatch
) -> None:
    x, keys, _ = tables()
    monkeypatch.setattr(vanilla_m.Activation, "__call__", lambda self, up: up)
    chosen = build(VanillaMConfig())(x, keys, None).block_ids
    assert torch.equal(chosen, build(AvgKConfig())(x, keys, None).block_ids)


def test_v3_under_relu_the_mean_is_the_mean_of_magnitudes(build) -> None:
    x, keys, _ = tables()
    ids = [
        build(VanillaMConfig(aggregator=name), activation_func=F.relu)(x, keys, None).block_ids
        for name in ("mean", "mean-abs")
    ]
    assert torch.equal(*ids)


def test_v4_all_aggregators_agree_on_single_cells_under_relu(build) -> None:
    x, keys, values = tables(blocks=24, cells=1)
    ys = []
    for name in AGGREGATORS:
        router = build(VanillaMConfig(aggregator=name), block_size=1, activation_func=F.relu)
        ids = router(x, keys, None).block_ids
        ys.append(block_ffn(x, keys, values, ids, activation="relu"))
    assert len(ys) == 5
    for y in ys[1:]:
        torch.testing.assert_close(y, ys[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_every_aggregator_computes_what_its_name_says(build, name: str) -> None:
    x, keys, _ = tables()
    post = F.gelu(torch.einsum("td,bgd->tbg", x, keys))
    score = {
        "mean": post.mean(2),
        "mean-abs": post.abs().mean(2),
        "max": post.max(2).values,
        "min": post.min(2).values,
        "norm": post.square().sum(2).sqrt(),
    }[name]
    ids = build(VanillaMConfig(aggregator=name))(x, keys, None).block_ids
    assert torch.equal(ids, route_topk(score, 4))


def test_the_softmax_of_the_norms_is_the_gate_of_autonomy_of_experts(build) -> None:
    x, keys, _ = tables()
    norms = F.gelu(torch.einsum("td,bgd->tbg", x, keys)).norm(dim=2)
    routing = build(VanillaMConfig(aggregator="norm", gate="softmax"))(x, keys, None)
    expected = norms.softmax(dim=1).gather(1, routing.block_ids)
    torch.testing.assert_close(routing.gates, expected, rtol=1e-10, atol=1e-12)


def test_a_block_whose_cells_are_all_off_has_a_finite_gradient_of_its_norm(build) -> None:
    x, keys, _ = tables()
    keys = (-keys.abs()).requires_grad_()
    config = VanillaMConfig(aggregator="norm", gate="softmax")
    routing = build(config, activation_func=F.relu)(x.abs(), keys, None)
    assert (routing.scores == 0).all()
    routing.gates.sum().backward()
    assert (keys.grad == 0).all()


def test_scoring_a_few_blocks_at_a_time_chooses_the_same_blocks(build, monkeypatch) -> None:
    x, keys, _ = tables()
    expected = build(VanillaMConfig())(x, keys, None).block_ids
    monkeypatch.setattr(vanilla_m, "SCRATCH_NUMBERS", 5 * T * G)
    assert torch.equal(build(VanillaMConfig())(x, keys, None).block_ids, expected)


def test_swiglu_uses_gate_and_up_keys(build) -> None:
    x, gate_keys, up_keys = tables()
    router = build(VanillaMConfig(), activation_func=F.silu, gated_linear_unit=True)
    gate, up = (torch.einsum("td,bgd->tbg", x, k) for k in (gate_keys, up_keys))
    expected = route_topk((F.silu(gate) * up).mean(2), 4)
    ids = router(x, torch.cat((gate_keys, up_keys), dim=1), None).block_ids
    assert torch.equal(ids, expected)
