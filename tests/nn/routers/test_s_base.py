"""S-BASE: balanced while training, plain top-K in evaluation."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import sinkhorn

from megatron_sffn.nn.routers import s_base
from megatron_sffn.nn.routers.s_base import SBaseConfig, balancing_prices
from megatron_sffn.ops import route_topk
from tests.nn.routers.conftest import B, D
from tests.support import router_cases
from tests.support.ranks import run_ranks
from tests.support.router_cases import Case

TOKENS = 1200


def skewed(build):
    """A router that prefers the first blocks by far, and tokens."""
    torch.manual_seed(3)
    router = build(SBaseConfig())
    x = torch.randn(TOKENS, D).double()
    x[:, 0] = 1.0
    with torch.no_grad():
        router.weight.normal_()
        router.weight[:, 0] = torch.linspace(4, -4, B)
    return router, x


def unevenness(ids: torch.Tensor) -> float:
    load = torch.bincount(ids.flatten(), minlength=B).double()
    return float(load.max() / load.mean())


def test_the_choice_in_training_is_balanced(build) -> None:
    router, x = skewed(build)
    keys = torch.zeros(B, 2, D)
    plain = route_topk(x @ router.weight.T, 4)
    assert unevenness(plain) > 2
    routing = router(x, keys)
    assert unevenness(routing.block_ids) < 1.5
    ids = routing.block_ids.sort(dim=1).values
    assert (ids.diff(dim=1) > 0).all()
    # The gate is a function of the scores, not of the plan.
    gates = (x @ router.weight.T).sigmoid().gather(1, routing.block_ids)
    torch.testing.assert_close(routing.gates, gates, rtol=1e-10, atol=1e-12)


def test_evaluation_is_plain_top_k(build) -> None:
    router, x = skewed(build)
    router.eval()
    expected = route_topk(x @ router.weight.T, 4)
    assert torch.equal(router(x, torch.zeros(B, 2, D)).block_ids, expected)


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
def test_the_plan_gives_every_block_the_same_weight(build, scale: float) -> None:
    router, x = skewed(build)
    scores = scale * (x @ router.weight.detach().T)
    plan = (scores + balancing_prices(scores)).softmax(dim=1)
    torch.testing.assert_close(
        plan.sum(0), torch.full((B,), TOKENS / B).double(), rtol=5e-3, atol=0
    )


def test_the_plan_is_that_of_sinkhorns_algorithm(build) -> None:
    router, x = skewed(build)
    scores = x @ router.weight.detach().T
    scores = scores / 4  # Megatron's hardly converges if scores are sharp
    expected = sinkhorn(scores - scores.amax(dim=1, keepdim=True), tol=1e-6)
    plan = (scores + balancing_prices(scores)).softmax(dim=1) / TOKENS
    torch.testing.assert_close(plan, expected, rtol=2e-2, atol=1e-9)
    assert torch.equal(route_topk(expected, 1), route_topk(plan, 1))


def test_prices_stop_changing_before_the_last_iteration(build, monkeypatch) -> None:
    router, x = skewed(build)
    scores = x @ router.weight.detach().T / 2
    prices = balancing_prices(scores)
    monkeypatch.setattr(s_base, "MAX_ITERATIONS", s_base.MAX_ITERATIONS // 2)
    assert torch.equal(balancing_prices(scores), prices)


@pytest.mark.parametrize("scale", [10.0, 1e3, 1e6])
def test_large_logits_give_finite_gates_and_valid_ids(build, scale: float) -> None:
    router, x = skewed(build)
    routing = router((scale * x).float(), torch.zeros(B, 2, D))
    assert routing.gates.isfinite().all()
    assert (routing.block_ids >= 0).all() and (routing.block_ids < B).all()


def test_a_shift_of_all_scores_of_a_token_changes_nothing(build) -> None:
    router, x = skewed(build)
    scores = x @ router.weight.detach().T
    shifted = scores + torch.linspace(-500, 500, TOKENS).double()[:, None]
    first, second = (route_topk(router.selection_scores(s), 4) for s in (scores, shifted))
    assert torch.equal(first, second)


def choices() -> torch.Tensor:
    """The ids of this tensor-parallel rank's tokens, in training."""
    layer = router_cases.build(Case(router="s-base"))
    hidden, _, _ = router_cases.inputs()
    group = torch.distributed.group.WORLD
    local_hidden = hidden.chunk(group.size())[group.rank()]
    return layer.router(local_hidden.flatten(0, 1), layer.experts.keys).block_ids


@pytest.mark.parametrize("tensor", [2])
def test_tensor_parallel_ranks_make_one_plan(tensor: int) -> None:
    (expected,) = run_ranks(1, choices)
    rank_ids = run_ranks(tensor, choices, tensor_model_parallel_size=tensor)
    assert torch.equal(torch.cat(rank_ids), expected)
