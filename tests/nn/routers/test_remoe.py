"""ReMoE: ReLU gates, a variable number of blocks, and the L1 loss that steers it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor

from megatron_sffn.nn.layer import SparseFFN, end_step
from megatron_sffn.nn.routers.remoe import ReMoEConfig
from megatron_sffn.ops import block_ffn
from megatron_sffn.utils.errors import ConfigError
from tests.nn.routers.conftest import B, D, G, T, tables, transformer
from tests.support.ranks import run_ranks

K = 4
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


@pytest.fixture(autouse=True)
def _unscaled_losses() -> None:
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(()))


def with_random_gate(router: Any) -> Any:
    """The router with a gate `[B, D]` that gives some tokens fewer than K positive scores."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        weight = torch.randn(B, D, generator=generator, dtype=torch.float64) - 0.3
        router.weight.copy_(weight)
    return router


def l1_loss(scores: Tensor, target: float) -> Tensor:
    """`B · Σ_e P_e F_e` block by block."""
    total = scores.new_zeros(())
    for block in range(scores.shape[1]):
        positive = [score for score in scores[:, block] if score > 0]
        load = len(positive) / (len(scores) * target)
        total = total + sum(positive, scores.new_zeros(())) / len(scores) * load
    return scores.shape[1] * total


@pytest.mark.parametrize("training", [True, False])
def test_the_largest_positive_gates_compute_and_other_slots_stay_empty(
    build: Callable[..., Any], training: bool
) -> None:
    router = with_random_gate(build(ReMoEConfig())).train(training)
    x, keys, values = tables()
    scores = x @ router.weight.T
    routing = router(x, keys, None)
    sizes = set()
    for row, row_scores in zip(routing.block_ids.tolist(), scores.tolist(), strict=True):
        positive = sorted((-score, block) for block, score in enumerate(row_scores) if score > 0)
        blocks = {block for _, block in positive[:K]}
        assert sorted(row) == [-1] * (K - len(blocks)) + sorted(blocks)
        sizes.add(len(blocks))
    assert len(sizes) > 1 and max(sizes) == K
    y = block_ffn(x, keys, values, routing.block_ids, routing.gates)
    up = torch.nn.functional.gelu(torch.einsum("td,bgd->tbg", x, keys))
    gates = scores.relu() * (scores >= scores.topk(K).values[:, -1:])
    torch.testing.assert_close(y, torch.einsum("tb,tbg,bgd->td", gates, up, values), **CLOSE)


def test_without_a_bound_all_positive_gates_compute(build: Callable[..., Any]) -> None:
    router = build(ReMoEConfig(), active_cells=B * G, expansion=1)
    router = with_random_gate(router)
    x, keys, _ = tables()
    ids = router(x, keys, None).block_ids
    assert torch.equal((ids >= 0).sum(dim=1), (x @ router.weight.T > 0).sum(dim=1))


@pytest.mark.parametrize("target", [None, 1.0, 3.5])
def test_the_loss_is_the_mean_gate_times_the_load_of_all_positive_gates(
    build: Callable[..., Any], target: float | None
) -> None:
    router = with_random_gate(build(ReMoEConfig(l1_coefficient=0.25, target=target)))
    x, keys, _ = tables()
    routing = router(x, keys, None)
    scores = x @ router.weight.T
    expected = l1_loss(scores, K / 2 if target is None else target)
    value = router.balance.take_values()["l1_loss"]
    torch.testing.assert_close(value, expected.detach(), rtol=1e-6, atol=0)
    # The tokens have a gradient of zero, so that only the loss has one.
    (actual,) = torch.autograd.grad(
        routing.queries, router.weight, torch.zeros_like(routing.queries), retain_graph=True
    )
    (wanted,) = torch.autograd.grad(0.25 * expected, router.weight)
    torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("target", "factor"), [(2.0, 1.5), (11.0, 1 / 1.5)], ids=["too many", "too few"]
)
def test_a_step_moves_the_coefficient_towards_the_target(
    build: Callable[..., Any], target: float, factor: float
) -> None:
    config = ReMoEConfig(l1_coefficient=0.01, l1_multiplier=1.5, target=target)
    router = with_random_gate(build(config, active_cells=B * G, expansion=1))
    x, keys, _ = tables()
    positive = float((x @ router.weight.T > 0).sum()) / T
    assert 2.0 < positive < 11.0, "the targets are on both sides"
    for step in range(1, 4):
        for _ in range(2):  # microbatches
            router(x, keys, None)
        router.end_step()
        assert float(router.balance.l1_coefficient) == pytest.approx(0.01 * factor**step, rel=1e-5)


def test_only_tokens_of_training_steer(build: Callable[..., Any]) -> None:
    router = with_random_gate(build(ReMoEConfig(l1_coefficient=0.01)))
    x, keys, _ = tables()
    with torch.no_grad():
        router(x, keys, None)  # the first pass of a recomputed layer
    router.eval()(x, keys, None)
    router.end_step()
    assert float(router.balance.l1_coefficient) == pytest.approx(0.01)


def test_training_reaches_the_target(one_rank: None) -> None:
    config = ReMoEConfig(l1_coefficient=1e-3, target=1.5, l1_multiplier=1.05)
    layer = SparseFFN(transformer(config, params_dtype=torch.float32), layer_number=1)
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    teacher = torch.randn(D, D)
    used = []
    for _ in range(600):
        x = torch.randn(8, 8, D)
        x[:, :, 0] = 2.0  # else half of the scores are positive, whatever the gate is
        optimizer.zero_grad()
        y, _ = layer(x)
        (y - (x @ teacher).tanh()).square().mean().backward()
        end_step(layer)
        optimizer.step()
        sums = layer.trained.take()
        used.append(float(sums.load.sum()) / 64)
    assert used[0] > 2.5
    assert sum(used[-100:]) / 100 == pytest.approx(1.5, abs=0.2)


def test_the_coefficient_is_saved_and_stays_in_fp32_in_half_precision_models(
    build: Callable[..., Any],
) -> None:
    router = build(ReMoEConfig())
    assert router.state_dict()["balance.l1_coefficient"].tolist() == pytest.approx([1e-8])
    assert "balance.gates_and_tokens" not in router.state_dict()
    router.bfloat16()
    router.balance._maintain_float32_expert_bias()
    assert router.balance.l1_coefficient.dtype == torch.float32
    without_loss = build(ReMoEConfig(l1_coefficient=0.0))
    assert set(without_loss.state_dict()) == {"weight"}


def steered() -> tuple[Tensor, Tensor, Tensor]:
    """The loss, its gradient in the gate and the next coefficient, of all ranks' tokens."""
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(()))
    router_config = ReMoEConfig(l1_coefficient=0.25, target=2.9)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    config = transformer(router_config)
    router = router_config.router_class()(config=config, pg_collection=groups)
    router.set_layer_number(1)
    router = with_random_gate(router)
    x, keys, _ = tables()
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    routing = router(x.chunk(ranks)[rank], keys, None)
    torch.autograd.backward(routing.queries, torch.zeros_like(routing.queries))
    loss, gradient = router.balance.take_values()["l1_loss"].double(), router.weight.grad
    for value in (loss, gradient):
        torch.distributed.all_reduce(value)
    router.end_step()
    return loss, gradient, router.balance.l1_coefficient.clone()


def test_tensor_parallel_ranks_have_the_loss_and_the_coefficient_of_one_rank() -> None:
    ((loss, gradient, coefficient),) = run_ranks(1, steered)
    for ranks in run_ranks(2, steered, tensor_model_parallel_size=2):
        torch.testing.assert_close(ranks[0], loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(ranks[1], gradient, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(ranks[2], coefficient)


def test_data_parallel_ranks_move_the_coefficient_together() -> None:
    ((_, _, coefficient),) = run_ranks(1, steered)
    for _, _, other in run_ranks(4, steered):
        torch.testing.assert_close(other, coefficient)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"gate": "sigmoid"}, "--sffn-gate sigmoid is not that of --sffn-router remoe"),
        ({"target": 5.0}, "--sffn-target-blocks 5 is not above 0 and at most the 4 blocks"),
        ({"target": 0.0}, "--sffn-target-blocks 0 is not above 0"),
        ({"target": 1.0, "l1_coefficient": 0.0}, "has nothing to act on with --sffn-l1-coeff 0"),
        ({"l1_multiplier": 0.9}, "--sffn-l1-multiplier 0.9 is out of range"),
        ({"l1_coefficient": -1.0}, "--sffn-l1-coeff -1.0 is out of range"),
    ],
)
def test_undefined_settings_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        transformer(ReMoEConfig(**options))
