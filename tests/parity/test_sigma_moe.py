"""sigma-MoE and the methods its paper compares (arXiv 2310.10837), by its authors' formulas.

Where our layer differs, by design:
- their Switch loss is a mean over tokens and experts, ours is Fedus et al.'s, B² times as large;
- their S-BASE subtracts prices in an iteration that should add them, ours is Clark et al.'s.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_sffn.nn.routers.s_base import balancing_prices
from tests.parity.compare import assert_same, copies_of, formula, sffn_outcome
from tests.support.router_cases import Case, build, draw

pytestmark = pytest.mark.usefixtures("one_rank")

RELU = (("activation_func", F.relu),)
NO_LOSS = (*RELU, ("moe_router_load_balancing_type", "none"))


def experts(x: Tensor, keys: Tensor, values: Tensor, factors: Tensor) -> Tensor:
    """`Σ_e factor_e · ReLU(x W1_e) W2_e` of all experts; factors `[T, B]`, 0 where not chosen."""
    hidden = torch.einsum("td,bgd->tbg", x, keys).relu()
    return torch.einsum("tbg,bgd,tb->td", hidden, values, factors)


def chosen(scores: Tensor, active: int) -> Tensor:
    """`[T, B]` 1 where a score is among the K largest of its token."""
    ids = scores.topk(active, dim=1).indices
    return torch.zeros_like(scores).scatter(1, ids, 1.0)


def test_scores_do_not_compete_and_dropout_and_entropy_act_as_in_the_paper() -> None:
    dropout, gamma = 0.4, 0.3
    options = (("block_dropout", dropout), ("entropy_coefficient", gamma))
    layer = build(Case(router="sigma-moe", megatron=NO_LOSS, options=options))

    def authors(x: Tensor, keys: Tensor, values: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        logits = x @ weight.T
        scores = logits.sigmoid()
        # An expert that is dropped for a token has a score of 0; other experts keep their scores.
        scores = scores * (torch.rand_like(scores) >= dropout)
        mean = logits.softmax(dim=1).mean(dim=0)
        loss = gamma * (mean * mean.log()).sum()
        return experts(x, keys, values, scores * chosen(scores, 4)), loss

    torch.manual_seed(4)
    actual = sffn_outcome(layer)
    torch.manual_seed(4)
    assert_same(actual, formula(authors, copies_of(layer)))


@pytest.mark.parametrize("router", ["softmax-before", "softmax-after"])
def test_softmax_before_and_after_the_choice_acts_as_in_the_paper(router: str) -> None:
    layer = build(Case(router=router, megatron=NO_LOSS))

    def authors(x: Tensor, keys: Tensor, values: Tensor, weight: Tensor) -> Tensor:
        logits = x @ weight.T
        is_chosen = chosen(logits, 4)
        if router == "softmax-after":
            logits = logits.masked_fill(is_chosen == 0, -math.inf)
        return experts(x, keys, values, logits.softmax(dim=1) * is_chosen)

    assert_same(sffn_outcome(layer), formula(authors, copies_of(layer)))


def test_the_authors_switch_loss_is_ours_divided_by_the_square_of_the_blocks() -> None:
    gamma, num_blocks = 0.01, 3  # K = 1, as its baseline has it
    loss = (
        ("moe_router_load_balancing_type", "aux_loss"),
        ("moe_aux_loss_coeff", gamma / num_blocks**2),
    )
    layer = build(Case(router="switch", block_size=16, megatron=(*RELU, *loss)))
    assert layer.router.sffn.num_blocks == num_blocks

    def authors(x: Tensor, keys: Tensor, values: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        probabilities = (x @ weight.T).softmax(dim=1)
        is_chosen = chosen(probabilities, 1)
        share = is_chosen.sum(dim=0) / is_chosen.sum()
        # The mean over tokens and experts.
        return experts(x, keys, values, probabilities * is_chosen), gamma * (
            probabilities * share
        ).mean()

    reference = formula(authors, copies_of(layer))
    assert_same(sffn_outcome(layer), reference)
    # The loss has an effect: without it the router's gradient differs.
    layer.router.balance.weights.clear()
    layer.zero_grad()
    plain = sffn_outcome(layer)["weight"]
    assert (plain - reference["weight"]).abs().max() > 1e-6


def authors_plan(logits: Tensor, iterations: int = 3) -> Tensor:
    """`[T, B]` logits after the iteration of S-BASE's authors; its prices change their sign."""
    tokens, blocks = logits.shape
    block_prices = logits.new_zeros(blocks)
    for _ in range(iterations):
        token_prices = math.log(tokens) - (logits - block_prices).logsumexp(dim=1)
        block_prices = math.log(blocks) - (logits - token_prices[:, None]).logsumexp(dim=0)
    return logits + block_prices + token_prices[:, None]


def test_s_base_has_the_authors_gate_but_a_choice_that_balances() -> None:
    layer = build(Case(router="s-base", megatron=NO_LOSS))

    def authors(x: Tensor, keys: Tensor, values: Tensor, weight: Tensor) -> Tensor:
        logits = x @ weight.T
        # The authors' choice in training is `authors_plan(logits)`.
        choice = logits + balancing_prices(logits.detach()) if layer.training else logits
        return experts(x, keys, values, logits.sigmoid() * chosen(choice, 4))

    for training in (True, False):
        layer.train(training).zero_grad()
        assert_same(sffn_outcome(layer), formula(authors, copies_of(layer)))


@pytest.mark.parametrize("active", [1, 4])
def test_the_authors_s_base_leaves_blocks_that_hardly_work(active: int) -> None:
    # 2,048 tokens, 16 blocks; some blocks are preferred by all tokens.
    logits = 3 * (draw(1, 2048, 16) + draw(2, 16))

    def least_and_most(choice: Tensor) -> tuple[float, float]:
        load = chosen(choice, active).mean(dim=0) * 16 / active
        return float(load.min()), float(load.max())

    least, most = least_and_most(authors_plan(logits))
    assert least < 0.1 and most > 1.5
    least, most = least_and_most(logits + balancing_prices(logits))
    assert least > 0.85 and most < 1.15
