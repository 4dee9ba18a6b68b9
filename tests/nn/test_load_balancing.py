"""Load balancing on one rank: every loss and its gradient, and the expert bias."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core.distributed.finalize_model_grads import (
    _update_router_expert_bias,
    reset_model_temporary_tensors,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor

from megatron_sffn.nn.config import RouterConfig
from megatron_sffn.nn.layer import SparseFFN
from megatron_sffn.nn.load_balancing import loss_weights
from megatron_sffn.nn.routers import ROUTERS
from megatron_sffn.nn.routers.avg_k import AvgKConfig
from megatron_sffn.nn.routers.s_base import SBaseConfig
from megatron_sffn.nn.routers.sigma_moe import SigmaMoEConfig
from megatron_sffn.nn.routers.switch import SwitchConfig
from megatron_sffn.ops import route_topk
from tests.nn.routers.conftest import transformer

pytestmark = pytest.mark.usefixtures("one_rank")

T, B, K, D = 16, 12, 4, 6
"""T·K is a power of two, so that shares of it are exact in fp32."""
CLOSE = {"rtol": 1e-10, "atol": 1e-12}
KEYS = torch.zeros(B, 2, D, dtype=torch.float64)


def with_losses(router: RouterConfig | None = None, **numbers: Any) -> Any:
    """A router of 12 blocks, 4 of them active, in training mode."""
    router = router or SwitchConfig()
    built_router = router.router_class()(
        config=transformer(router, **numbers),
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    built_router.set_layer_number(1)
    return built_router


def config_with(kind: str, weight: float = 0.3) -> tuple[RouterConfig, dict[str, Any]]:
    """A router's config and Megatron's flags for one kind of loss."""
    if kind == "entropy_loss":
        return SwitchConfig(entropy_coefficient=weight), {}
    if kind == "z_loss":
        return SwitchConfig(), {"moe_z_loss_coeff": weight}
    flags = {"moe_router_load_balancing_type": kind, "moe_aux_loss_coeff": weight}
    return SwitchConfig(), flags


def logits(seed: int = 0, tokens: int = T) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(tokens, B, dtype=torch.float64, generator=generator)
    return (2 * drawn + torch.linspace(1, -1, B)).requires_grad_()


def route(router: Any, scores: Tensor, sequences: int = 1) -> Any:
    """The routing of these scores, differentiable in them."""
    router.score = lambda x, queries, keys: scores
    return router(torch.zeros(len(scores), D, dtype=torch.float64), KEYS, None, sequences)


def gradient(routing: Any, scores: Tensor) -> Tensor:
    """Gradient of the attached losses, without any other loss, in the scores."""
    (grad,) = torch.autograd.grad(routing.queries.sum(), scores)
    return grad


def counts(scores: Tensor) -> Tensor:
    """`[B]`: how often each block is chosen."""
    ids = scores.detach().sort(dim=1, descending=True).indices[:, :K]
    return torch.stack([(ids == block).sum() for block in range(B)]).double()


def switch_loss(scores: Tensor, counts_B: Tensor) -> Tensor:
    """`B · Σ P_e F_e`, with F from the given counts."""
    p = (scores.exp() / scores.exp().sum(dim=1, keepdim=True)).mean(dim=0)
    return B * (p * counts_B / counts_B.sum()).sum()


def formula(kind: str, scores: Tensor, sequences: int) -> Tensor:
    """The loss of one microbatch, the first of its step, by its formula."""
    if kind == "z_loss":
        return scores.exp().sum(dim=1).log().square().mean()
    if kind == "entropy_loss":
        p = (scores.exp() / scores.exp().sum(dim=1, keepdim=True)).mean(dim=0)
        return (p * p.log()).sum()
    if kind == "seq_aux_loss":
        # The tokens of sequence i are the tokens i, i + sequences, ... of T.
        by_sequence = [scores[first::sequences] for first in range(sequences)]
        return torch.stack([switch_loss(s, counts(s)) for s in by_sequence]).mean()
    return switch_loss(scores, counts(scores))


NAMES = {
    "aux_loss": "load_balancing_loss",
    "seq_aux_loss": "seq_load_balancing_loss",
    "global_aux_loss": "global_load_balancing_loss",
    "z_loss": "z_loss",
    "entropy_loss": "entropy_loss",
}


@pytest.mark.parametrize("sequences", [1, 4])
@pytest.mark.parametrize("kind", NAMES)
def test_every_loss_and_its_gradient_equal_the_formula(kind: str, sequences: int) -> None:
    config, flags = config_with(kind, 0.3)
    router, scores = with_losses(config, **flags), logits()
    routing = route(router, scores, sequences)
    expected = formula(kind, scores, sequences)
    torch.testing.assert_close(
        gradient(routing, scores), torch.autograd.grad(0.3 * expected, scores)[0], **CLOSE
    )
    values = router.balance.take_values()
    assert set(values) == {NAMES[kind]}
    torch.testing.assert_close(values[NAMES[kind]], expected.detach(), **CLOSE)


def test_losses_of_several_kinds_add_up() -> None:
    router = with_losses(
        SwitchConfig(entropy_coefficient=0.5),
        moe_router_load_balancing_type=["aux_loss", "seq_aux_loss", "global_aux_loss"],
        moe_aux_loss_coeff=[0.1, 0.2, 0.3],
        moe_z_loss_coeff=0.4,
    )
    scores = logits()
    routing = route(router, scores, 4)
    weights = dict(zip(NAMES, (0.1, 0.2, 0.3, 0.4, 0.5), strict=True))
    expected = sum(weight * formula(kind, scores, 4) for kind, weight in weights.items())
    torch.testing.assert_close(
        gradient(routing, scores), torch.autograd.grad(expected, scores)[0], **CLOSE
    )
    assert set(router.balance.take_values()) == set(NAMES.values())


@pytest.mark.parametrize("kind", ["aux_loss", "seq_aux_loss", "global_aux_loss"])
def test_s2_the_losses_range_from_1_to_b(kind: str) -> None:
    config, flags = config_with(kind)
    even = with_losses(config, **flags)
    route(even, torch.zeros(T, B, dtype=torch.float64, requires_grad=True), 4)
    assert float(even.balance.take_values()[NAMES[kind]]) == pytest.approx(1.0)
    collapsed = with_losses(config, **flags, active_cells=2, expansion=B)  # K = 1
    scores = torch.zeros(T, B, dtype=torch.float64)
    scores[:, 5] = 1e3
    route(collapsed, scores.requires_grad_(), 4)
    assert float(collapsed.balance.take_values()[NAMES[kind]]) == pytest.approx(B)


def test_the_global_loss_counts_choices_since_the_step_began() -> None:
    config, flags = config_with("global_aux_loss", 0.3)
    router = with_losses(config, **flags)
    for step in range(2):
        chosen = torch.zeros(B, dtype=torch.float64)
        for microbatch, tokens in enumerate((16, 16, 32)):  # their sums are powers of two
            scores = logits(10 * step + microbatch, tokens)
            routing = route(router, scores)
            chosen += counts(scores)
            expected = switch_loss(scores, chosen)
            torch.testing.assert_close(
                gradient(routing, scores), torch.autograd.grad(0.3 * expected, scores)[0], **CLOSE
            )
            (value,) = router.balance.take_values().values()
            torch.testing.assert_close(value, expected.detach(), **CLOSE)
        # Megatron calls it at the end of a step.
        reset_model_temporary_tensors(router.config, [router])


def test_m4_the_entropy_loss_is_between_minus_log_b_and_zero() -> None:
    router = with_losses(SigmaMoEConfig(entropy_coefficient=1e-3))

    def value(scores: Tensor) -> float:
        route(router, scores)
        return float(router.balance.take_values()["entropy_loss"])

    assert value(torch.zeros(T, B, dtype=torch.float64)) == pytest.approx(-math.log(B))
    collapsed = torch.zeros(T, B, dtype=torch.float64)
    collapsed[:, 3] = 1e3
    assert value(collapsed) == pytest.approx(0, abs=1e-9)
    # Each token is certain, but the mean over tokens is even, and the loss is of the mean.
    one_hot = 1e3 * torch.eye(B, dtype=torch.float64)
    assert value(one_hot) == pytest.approx(-math.log(B))
    for seed in range(10):
        assert -math.log(B) < value(3 * logits(seed)) < 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", NAMES)
def test_a_collapsed_choice_has_finite_gradients(kind: str, dtype: torch.dtype) -> None:
    # The probabilities of all blocks that were not chosen are zero in this dtype.
    config, flags = config_with(kind)
    scores = torch.zeros(T, B, dtype=dtype)
    scores[:, 3] = 1e4
    scores.requires_grad_()
    assert gradient(route(with_losses(config, **flags), scores), scores).isfinite().all()


@pytest.mark.parametrize("kind", NAMES)
def test_no_loss_is_attached_in_evaluation_or_in_the_first_pass_of_recomputation(kind: str) -> None:
    config, flags = config_with(kind)
    router, scores = with_losses(config, **flags), logits()
    router.eval()
    assert route(router, scores).queries is None
    router.train()
    with torch.no_grad():
        assert route(router, scores).queries is None
    assert router.balance.take_values() == {}
    if kind == "global_aux_loss":
        assert (router.balance.tokens_of_step == 0).all()


@pytest.mark.parametrize("kind", NAMES)
def test_a_loss_with_coefficient_zero_is_not_computed(kind: str) -> None:
    config, flags = config_with(kind, 0.0)
    router = with_losses(config, **flags)
    assert router.balance.weights == {}
    assert not router.balance.differentiates
    assert route(router, logits()).queries is None


def test_avg_k_without_a_loss_does_not_differentiate_its_scores() -> None:
    layer = SparseFFN(transformer(AvgKConfig()), layer_number=1)
    x = torch.randn(5, 1, D, dtype=torch.float64, requires_grad=True)
    routing = layer.router(x.flatten(0, 1), layer.experts.keys)
    assert routing.queries is None and routing.gates is None
    balanced = SparseFFN(transformer(AvgKConfig(entropy_coefficient=0.1)), layer_number=1)
    routing = balanced.router(x.flatten(0, 1), balanced.experts.keys)
    routing.queries.sum().backward()
    assert balanced.experts.keys.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", NAMES)
def test_per_token_losses_have_the_gradient_of_a_sum_over_tokens(kind: str) -> None:
    # Megatron divides the gradient by the number of tokens of all ranks later.
    config, flags = config_with(kind, 0.3)
    scores = logits()
    plain = gradient(route(with_losses(config, **flags), scores), scores)
    per_token = with_losses(config, **flags, calculate_per_token_loss=True)
    routing = route(per_token, scores)
    torch.testing.assert_close(gradient(routing, scores), T * plain, **CLOSE)
    torch.testing.assert_close(
        per_token.balance.take_values()[NAMES[kind]], formula(kind, scores, 1).detach(), **CLOSE
    )


def test_the_gradient_is_multiplied_by_megatrons_loss_scale(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, flags = config_with("aux_loss", 0.3)
    router, scores = with_losses(config, **flags), logits()
    plain = gradient(route(router, scores), scores)
    monkeypatch.setattr(MoEAuxLossAutoScaler, "main_loss_backward_scale", torch.tensor(8.0))
    torch.testing.assert_close(gradient(route(router, scores), scores), 8 * plain, **CLOSE)


def test_loss_values_accumulate_until_they_are_taken_and_reach_megatrons_log() -> None:
    config, flags = config_with("aux_loss")
    router = with_losses(config, **flags)
    microbatches = [logits(seed) for seed in range(3)]
    for scores in microbatches:
        route(router, scores)
    total = sum(formula("aux_loss", scores, 1).detach() for scores in microbatches)
    metric = get_moe_metrics_tracker().metrics["load_balancing_loss"].values
    torch.testing.assert_close(metric.double(), torch.stack((total, torch.zeros(()))).double())
    torch.testing.assert_close(router.balance.take_values()["load_balancing_loss"], total, **CLOSE)
    assert router.balance.take_values() == {}


def test_dropped_blocks_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.3}
    router = with_losses(
        SwitchConfig(block_dropout=0.75), **flags, moe_router_enable_expert_bias=True
    )
    scores = logits()
    torch.manual_seed(0)
    routing = route(router, scores)
    kept_ids = routing.block_ids[routing.block_ids >= 0]
    assert len(kept_ids) < T * K
    chosen = torch.bincount(kept_ids, minlength=B).double()
    assert torch.equal(router.balance.local_tokens_per_expert.double(), chosen)
    (value,) = router.balance.take_values().values()
    torch.testing.assert_close(value, switch_loss(scores, chosen).detach(), rtol=1e-6, atol=0)


BIASED = {"moe_router_enable_expert_bias": True}


@pytest.mark.parametrize(
    ("gate", "squash"),
    [
        ("none", lambda scores: scores),
        ("sigmoid", lambda scores: scores.sigmoid()),
        ("softmax", lambda scores: scores.softmax(dim=1)),
    ],
)
def test_the_expert_bias_is_added_for_the_choice_only(
    gate: str, squash: Callable[[Tensor], Tensor]
) -> None:
    # A router without a gate is trained by its auxiliary loss only.
    losses = BIASED | {"moe_z_loss_coeff": 0.1}
    router, scores = with_losses(SwitchConfig(gate=gate), **losses), logits()
    torch.manual_seed(0)
    bias = 0.3 * torch.randn(B)
    router.balance.expert_bias.copy_(bias)
    routing = route(router, scores)
    ids = route_topk(squash(scores) + bias, K)
    assert not torch.equal(ids, route_topk(scores, K))
    assert torch.equal(routing.block_ids, ids)
    if gate == "none":
        assert routing.gates is None
    else:
        torch.testing.assert_close(routing.gates, squash(scores).gather(1, ids), **CLOSE)
    torch.testing.assert_close(routing.scores, scores.detach().gather(1, ids), **CLOSE)
    router.eval()  # the model was trained with this choice
    assert torch.equal(route(router, scores).block_ids, ids)


def test_s_base_adds_the_expert_bias_to_its_balanced_scores() -> None:
    router, scores = with_losses(SBaseConfig(), **BIASED), logits()
    with torch.no_grad():
        plan = router.selection_scores(scores)
        router.balance.expert_bias[4] = 100.0
    ids = route(router, scores).block_ids
    assert (ids == 4).any(dim=1).all()
    assert torch.equal(ids, route_topk(plan + router.balance.expert_bias, K))


def test_choices_are_counted_once_per_training_microbatch() -> None:
    router = with_losses(**BIASED)
    total = torch.zeros(B, dtype=torch.float64)
    for seed in range(2):
        scores = logits(seed)
        with torch.no_grad():
            route(router, scores)  # the first pass of a recomputed layer
        route(router, scores)
        total += counts(scores)
    router.eval()
    route(router, logits(3))
    assert torch.equal(router.balance.local_tokens_per_expert.double(), total)


def test_megatron_raises_the_bias_of_unused_blocks_and_a_near_tie_flips() -> None:
    router = with_losses(**BIASED, moe_router_bias_update_rate=1e-3)
    world = torch.distributed.group.WORLD
    # Blocks 0 to 3 have slightly higher scores for every token.
    scores = torch.zeros(T, B, dtype=torch.float64)
    scores[:, :K] = 1e-2
    chosen = []
    for _ in range(2):
        chosen.append(route(router, scores.requires_grad_()).block_ids)
        _update_router_expert_bias([router], router.config, world)
        reset_model_temporary_tensors(router.config, [router])
    assert (chosen[0] == torch.arange(K)).all()
    assert (chosen[1] >= K).all(), "one update of the bias must reverse the order"
    assert router.balance.local_tokens_per_expert.abs().sum() == 0
    used = torch.zeros(B, dtype=torch.bool)
    used[:2] = True
    two_blocks_router = with_losses(
        active_cells=4, expansion=6, **BIASED, moe_router_bias_update_rate=1e-3
    )
    scores = torch.zeros(T, B, dtype=torch.float64)
    scores[:, :2] = 5.0  # far ahead, so one update does not change the choice
    route(two_blocks_router, scores.requires_grad_())
    _update_router_expert_bias([two_blocks_router], two_blocks_router.config, world)
    torch.testing.assert_close(
        two_blocks_router.balance.expert_bias, torch.where(used, -1e-3, 1e-3), rtol=1e-6, atol=0
    )
    assert torch.equal(route(two_blocks_router, scores).block_ids, torch.arange(2).expand(T, 2))


def test_the_expert_bias_stays_in_fp32_and_is_saved_without_its_counts() -> None:
    router = with_losses(**BIASED)
    router.bfloat16()
    for module in router.modules():
        if hasattr(module, "_maintain_float32_expert_bias"):
            module._maintain_float32_expert_bias()
    assert router.balance.expert_bias.dtype == torch.float32
    assert set(router.state_dict()) == {"weight", "balance.expert_bias"}
    assert set(with_losses().state_dict()) == {"weight"}


@pytest.mark.parametrize("tokens", [16, 300, 1000])
def test_counts_are_exact_in_a_half_precision_model(tokens: int) -> None:
    # bfloat16 cannot represent odd numbers above 256.
    flags = {"moe_router_load_balancing_type": "global_aux_loss", "moe_aux_loss_coeff": 0.01}
    router = with_losses(**BIASED, **flags)
    router.bfloat16()
    for module in router.modules():
        if hasattr(module, "_maintain_float32_expert_bias"):
            module._maintain_float32_expert_bias()
    total = torch.zeros(B, dtype=torch.float64)
    for seed in range(3):
        scores = logits(seed, tokens)
        route(router, scores)
        total += counts(scores)
    assert torch.equal(router.balance.local_tokens_per_expert.double(), total)
    assert torch.equal(router.balance.tokens_of_step.double(), total)


def test_megatrons_flags_become_loss_coefficients() -> None:
    def weights(**flags: Any) -> dict[str, float]:
        return loss_weights(transformer(SwitchConfig(), **flags), 0.5)

    assert weights() == {"entropy_loss": 0.5}
    one_loss = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.1}
    assert weights(**one_loss) == {"aux_loss": 0.1, "entropy_loss": 0.5}
    assert weights(**one_loss, moe_z_loss_coeff=0.2)["z_loss"] == 0.2
    two_losses = {
        "moe_router_load_balancing_type": ["seq_aux_loss", "global_aux_loss"],
        "moe_aux_loss_coeff": [0.1, 0.0],
    }
    assert weights(**two_losses) == {"seq_aux_loss": 0.1, "entropy_loss": 0.5}


def test_default_coefficients_are_those_of_the_papers() -> None:
    defaults = {name: config.balance_coefficient for name, config in ROUTERS.items()}
    assert {name for name, value in defaults.items() if value} == {"switch", "noisy-top-k"}
    assert defaults["switch"] == 0.01
