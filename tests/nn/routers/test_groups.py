"""Group-limited routing: the blocks of a token lie in its best groups."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import group_limited_topk
from torch import Tensor

from megatron_sffn.nn.routers.groups import in_best_groups
from megatron_sffn.ops.route_topk import route_topk
from megatron_sffn.utils.errors import ConfigError
from tests.support import router_cases
from tests.support.ranks import run_ranks
from tests.support.router_cases import Case

GROUPS = (("moe_router_num_groups", 4), ("moe_router_group_topk", 2))
"""The 12 blocks of `router_cases` in 4 groups of 3; a token chooses 4 blocks in 2 groups."""


def choose(scores: Tensor, active: int, groups: int, group_topk: int) -> Tensor:
    """Ids `[T, K]` as a router chooses them."""
    allowed = in_best_groups(scores, active, groups, group_topk, route_topk)
    return route_topk(scores.masked_fill(~allowed, -torch.inf), active)


@pytest.mark.parametrize(
    ("blocks", "active", "groups", "group_topk"),
    [(12, 4, 4, 2), (64, 6, 8, 3), (16, 8, 4, 2), (8, 2, 2, 1), (6, 2, 1, 1)],
)
def test_group_limited_routing_chooses_the_blocks_of_megatron(
    blocks: int, active: int, groups: int, group_topk: int
) -> None:
    scores = torch.randn(50, blocks, generator=torch.Generator().manual_seed(1))
    _, expected = group_limited_topk(scores, active, 50, blocks, groups, group_topk)
    chosen = choose(scores, active, groups, group_topk)
    assert torch.equal(chosen, expected.sort(dim=1).values)


def test_equal_groups_and_blocks_are_taken_in_order() -> None:
    assert choose(torch.zeros(3, 12), 4, 4, 2).tolist() == [[0, 1, 2, 3]] * 3
    scores = torch.tensor([[0.0, 0, 0, 5, 1, 1, 5, 1, 1, 0, 0, 0]])
    assert choose(scores, 2, 4, 2).tolist() == [[3, 6]]


def test_a_group_of_blocks_is_chosen_by_its_mean_score_without_the_dropped_blocks() -> None:
    scores = torch.tensor(
        [
            [9.0, -9, -9, 1, 1, 1, 2, 2, -torch.inf, 0, 0, 0],
            [-torch.inf, -torch.inf, -torch.inf, -7, -7, -7, -8, -8, -8, -9, -9, -9],
        ]
    )
    allowed = in_best_groups(scores, 2, 4, 1, route_topk, "mean")
    assert allowed.nonzero().view(2, 3, 2)[:, :, 1].tolist() == [[6, 7, 8], [3, 4, 5]]
    # The largest scores are in the first group.
    assert in_best_groups(scores, 1, 4, 1, route_topk)[0, :3].all()


def two_levels() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ids of Avg-K at two levels, its tokens and keys, and the output of the layer."""
    options = (("group_score", "mean"),)
    layer = router_cases.build(Case(router="avg-k", options=options, megatron=GROUPS))
    hidden, _, _ = router_cases.inputs()
    x, keys = hidden.reshape(-1, router_cases.D), layer.experts()[0]
    return layer.router(x, keys).block_ids, x, keys.detach(), layer(hidden)[0].detach()


def test_avg_k_chooses_large_blocks_and_then_smaller_blocks_within_them() -> None:
    ((ids, x, keys, _),) = run_ranks(1, two_levels)
    for token, row in zip(x, ids.tolist(), strict=True):
        # Large blocks of 3 · 4 cells, by their mean keys.
        large = (keys.view(4, 12, -1).mean(dim=1) @ token).topk(2).indices.tolist()
        small = {3 * block + part for block in large for part in range(3)}
        scores = {block: float(keys[block].mean(dim=0) @ token) for block in small}
        assert row == sorted(sorted(scores, key=scores.__getitem__)[-4:])


def outputs(case: Case) -> Tensor:
    """The output of a layer."""
    return router_cases.run(case)["y"]


def test_all_smaller_blocks_of_large_blocks_are_avg_k_with_large_blocks() -> None:
    # 2 of 6 groups of 2 blocks of 4 cells; K = 4, so that all blocks of a group are taken.
    groups = (("moe_router_num_groups", 6), ("moe_router_group_topk", 2))
    fine = Case(router="avg-k", options=(("group_score", "mean"),), megatron=groups)
    (fine_output,) = run_ranks(1, outputs, fine)
    (large_output,) = run_ranks(1, large_block_output)
    torch.testing.assert_close(fine_output, large_output, rtol=1e-10, atol=1e-12)


def large_block_output() -> Tensor:
    """The output of Avg-K with blocks of 8 cells, which are pairs of the blocks of 4 cells."""
    fine = router_cases.build(Case(router="avg-k"))
    large = router_cases.build(Case(router="avg-k", block_size=8))
    with torch.no_grad():
        for large_table, table in zip(
            large.experts.parameters(), fine.experts.parameters(), strict=True
        ):
            large_table.copy_(table.view_as(large_table))
    return large(router_cases.inputs()[0])[0].detach()


def groups_of_tokens(case: Case) -> tuple[Tensor, Tensor]:
    """Ids `[T, K]` of a layer's tokens, and the number of groups of 3 blocks of each token."""
    layer = router_cases.build(case).train(case.training)
    hidden, ids, _ = router_cases.inputs()
    tokens = hidden.reshape(-1, router_cases.D)
    block_ids = layer.router(
        tokens, layer.experts()[0], ids.T.reshape(-1), router_cases.BATCH
    ).block_ids
    reached = torch.zeros(len(block_ids), 5, dtype=torch.bool)
    reached.scatter_(1, block_ids.div(3, rounding_mode="floor") + 1, True)
    return block_ids, reached[:, 1:].sum(dim=1)


SCORED = ["avg-k", "vanilla-m", "switch", "sigma-moe", "softmax-after", "s-base"]


@pytest.mark.parametrize("router", SCORED)
def test_a_token_stays_in_its_groups(router: str) -> None:
    ((ids, free_groups),) = run_ranks(1, groups_of_tokens, Case(router=router))
    ((limited_ids, limited_groups),) = run_ranks(
        1, groups_of_tokens, Case(router=router, megatron=GROUPS)
    )
    assert ids.shape == limited_ids.shape
    assert free_groups.max() > 2
    assert limited_groups.max() == 2


def test_bias_and_dropped_blocks_stay_in_the_groups_too() -> None:
    case = Case(
        router="sigma-moe",
        options=(("block_dropout", 0.6),),
        megatron=(*GROUPS, ("moe_router_enable_expert_bias", True)),
    )
    ((ids, reached),) = run_ranks(1, groups_of_tokens, case)
    assert reached.max() <= 2
    assert (ids == -1).any(), "of 6 blocks in two groups often fewer than 4 are left"


@pytest.mark.parametrize("router", ["avg-k", "sigma-moe"])
def test_two_expert_ranks_compute_the_layer_of_one(router: str) -> None:
    case = Case(router=router, megatron=GROUPS)
    (expected,) = run_ranks(1, router_cases.run, case)
    for result in run_ranks(2, router_cases.run, case, expert_model_parallel_size=2):
        for name, value in expected.items():
            torch.testing.assert_close(result[name], value, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize(
    ("groups", "group_topk", "sentence"),
    [
        (4, None, "needs --moe-router-group-topk, too"),
        (None, 2, "needs --moe-router-num-groups, too"),
        (5, 1, "--moe-router-num-groups 5 does not divide the 12 blocks"),
        (4, 3, "--moe-router-group-topk 3 is not a divisor of the 4 blocks"),
        (2, 4, "--moe-router-group-topk 4 is not a divisor .* to --moe-router-num-groups 2"),
        (6, 1, "--moe-router-group-topk 1 groups of 2 blocks do not hold the 4 blocks"),
    ],
)
@pytest.mark.usefixtures("one_rank")
def test_impossible_numbers_of_groups_are_refused(
    groups: int | None, group_topk: int | None, sentence: str
) -> None:
    megatron = (("moe_router_num_groups", groups), ("moe_router_group_topk", group_topk))
    with pytest.raises(ConfigError, match=sentence):
        router_cases.config_of(Case(router="avg-k", megatron=megatron))


@pytest.mark.usefixtures("one_rank")
def test_a_group_score_without_groups_is_refused() -> None:
    with pytest.raises(ConfigError, match="--sffn-group-score mean has nothing to act on without"):
        router_cases.config_of(Case(router="avg-k", options=(("group_score", "mean"),)))
