"""Auxiliary losses on several ranks have the value and the gradient of one rank with all tokens.

Megatron sums gradients over tensor-parallel ranks and averages them over data-parallel ranks. It
does so for experts too, although their ranks already have the gradients of all tokens of the group.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.distributed.finalize_model_grads import (
    _update_router_expert_bias,
    _update_router_qb_beta,
    reset_model_temporary_tensors,
)
from torch import Tensor

from tests.support import router_cases
from tests.support.ranks import run_ranks
from tests.support.router_cases import BATCH, Case, D, S

WEIGHT = 0.3
KINDS = ["aux_loss", "seq_aux_loss", "global_aux_loss", "z_loss", "entropy_loss"]
ROUTERS = ["switch", "sigma-moe", "avg-k", "vanilla-m", "lorkm"]
"""Routers with a gate network, and routers whose scores need the keys of all ranks."""


def groups(tp: int = 1, ep: int = 1, etp: int = 1) -> dict[str, int]:
    """Arguments of `initialize_model_parallel`."""
    return {
        "tensor_model_parallel_size": tp,
        "expert_model_parallel_size": ep,
        "expert_tensor_parallel_size": etp,
    }


LAYOUTS = {
    "DP2": (2, groups()),
    "DP4": (4, groups()),
    "TP2": (2, groups(tp=2)),
    "TP2 DP2": (4, groups(tp=2)),
    "EP2": (2, groups(ep=2)),
    "EP4": (4, groups(ep=4)),
    "TP2 EP4": (4, groups(tp=2, ep=4)),
    "EP2 ETP2": (4, groups(ep=2, etp=2)),
}


@dataclass(frozen=True)
class LossCase:
    """An auxiliary loss of a router.

    Args:
        router: name.
        kind: of the loss.
        microbatches: number of microbatches of a step on one rank. Data-parallel ranks have one
            microbatch each.
    """

    router: str
    kind: str
    microbatches: int = 1


def case_of(loss: LossCase) -> Case:
    options: tuple[tuple[str, Any], ...] = ()
    flags: tuple[tuple[str, Any], ...] = ()
    if loss.kind == "entropy_loss":
        options = (("entropy_coefficient", WEIGHT),)
    elif loss.kind == "z_loss":
        flags = (("moe_z_loss_coeff", WEIGHT),)
    else:
        flags = (("moe_router_load_balancing_type", loss.kind), ("moe_aux_loss_coeff", WEIGHT))
    if loss.kind in ("entropy_loss", "z_loss"):
        flags += (("moe_router_load_balancing_type", "none"),)
    return Case(router=loss.router, options=options, megatron=flags)


def local_tokens(hidden: Tensor) -> Tensor:
    """This rank's tokens of `[S, b, D]`."""
    dp_group = parallel_state.get_data_parallel_group()
    tp_group = parallel_state.get_tensor_model_parallel_group()
    hidden = hidden.chunk(dp_group.size(), dim=1)[dp_group.rank()]
    return hidden.chunk(tp_group.size())[tp_group.rank()]


def losses(cases: list[LossCase]) -> list[dict[str, Tensor]]:
    """For each case the loss and its gradients in the router's weights and keys, of all ranks."""
    results = []
    dp_size = parallel_state.get_data_parallel_world_size()
    for case in cases:
        layer = router_cases.build(case_of(case))
        for microbatch in router_cases.draw(1, S, BATCH, D).chunk(case.microbatches, dim=1):
            x = local_tokens(microbatch)
            routing = layer.router(x.flatten(0, 1), layer.experts.keys, None, x.shape[1])
            # Gradients of zero for the tokens, so that only the auxiliary loss has a gradient.
            torch.autograd.backward(routing.queries, torch.zeros_like(routing.queries))
        result = dict(layer.router.balance.take_values())
        result |= {
            f"d{name}": weight.grad
            for name, weight in layer.router.named_parameters()
            if weight.grad is not None
        }
        for name, value in result.items():
            value = value.double() / case.microbatches / dp_size
            torch.distributed.all_reduce(value)
            result[name] = value
        if layer.experts.keys.grad is not None:
            result["dkeys"] = gathered_dkeys(layer) / case.microbatches / dp_size
        results.append(result)
    return results


def gathered_dkeys(layer: Any) -> Tensor:
    """The gradient `[B, G, width]` of the keys, gathered from the ranks that hold them."""
    grid, grad = layer.experts.expert_grid, layer.experts.keys.grad.clone()
    torch.distributed.all_reduce(grad, group=parallel_state.get_expert_data_parallel_group())
    return torch.cat(grid.gather_blocks(grad).unbind(1), dim=1)


@cache
def losses_on(
    layout: str | None, microbatches: int = 1
) -> dict[tuple[str, str], list[dict[str, Tensor]]]:
    """`losses` of every router and kind, from each rank of a layout; None for one rank."""
    cases = [LossCase(router, kind, microbatches) for router in ROUTERS for kind in KINDS]
    num_ranks, sizes = LAYOUTS[layout] if layout else (1, {})
    by_case = zip(*run_ranks(num_ranks, losses, cases, **sizes), strict=True)
    return {
        (case.router, case.kind): list(by_rank)
        for case, by_rank in zip(cases, by_case, strict=True)
    }


def dp_size_of(name: str) -> int:
    ranks, sizes = LAYOUTS[name]
    return ranks // sizes["tensor_model_parallel_size"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_m4_a_loss_and_its_gradient_equal_those_of_one_rank(
    name: str, router: str, kind: str
) -> None:
    # `aux_loss` depends on the microbatch: one rank has a microbatch for each data-parallel rank.
    microbatches = dp_size_of(name) if kind == "aux_loss" else 1
    (expected,) = losses_on(None, microbatches)[router, kind]
    assert any(key.startswith("d") for key in expected)
    for result in losses_on(name)[router, kind]:
        assert result.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(result[key], value, rtol=1e-6, atol=1e-10, msg=key)
            if key.startswith("d"):
                assert value.abs().max() > 1e-6, key


@pytest.mark.parametrize("kind", ["z_loss", "entropy_loss"])
def test_m4_losses_without_counts_agree_to_ten_digits(kind: str) -> None:
    for router in ROUTERS:
        (expected,) = losses_on(None)[router, kind]
        for result in losses_on("TP2 EP4")[router, kind]:
            for key, value in expected.items():
                torch.testing.assert_close(result[key], value, rtol=1e-10, atol=1e-13, msg=key)


def test_the_loss_of_two_microbatches_differs_from_that_of_the_batch() -> None:
    # Otherwise the tests above could not distinguish F of one rank from F of all ranks.
    for router in ROUTERS:
        (of_batch,) = losses_on(None)[router, "aux_loss"]
        (of_microbatches,) = losses_on(None, 2)[router, "aux_loss"]
        name = "load_balancing_loss"
        assert not torch.allclose(of_batch[name], of_microbatches[name], rtol=1e-3)
        (global_loss,) = losses_on(None)[router, "global_aux_loss"]
        torch.testing.assert_close(global_loss["global_" + name], of_batch[name])


def global_losses() -> list[Tensor]:
    """The global loss of each microbatch, averaged over ranks; two steps of three microbatches."""
    layer = router_cases.build(case_of(LossCase("switch", "global_aux_loss")))
    values = []
    for step in range(2):
        for microbatch in range(3):
            x = local_tokens(router_cases.draw(10 * step + microbatch, S, BATCH, D))
            layer.router(x.flatten(0, 1), layer.experts.keys, None, x.shape[1])
            (value,) = layer.router.balance.take_values().values()
            value = value / parallel_state.get_data_parallel_world_size()
            torch.distributed.all_reduce(value)
            values.append(value)
        reset_model_temporary_tensors(layer.config, [layer])
    return values


@pytest.mark.parametrize("name", ["DP2", "TP2 DP2", "EP4"])
def test_the_global_loss_counts_the_microbatches_of_all_ranks(name: str) -> None:
    (expected,) = run_ranks(1, global_losses)
    ranks, sizes = LAYOUTS[name]
    for values in run_ranks(ranks, global_losses, **sizes):
        torch.testing.assert_close(torch.stack(values), torch.stack(expected), rtol=1e-6, atol=0)


def biases() -> tuple[Tensor, Tensor]:
    """The expert bias after three steps, and the blocks that it makes a token choose."""
    flags = (("moe_router_enable_expert_bias", True), ("moe_router_bias_update_rate", 0.05))
    layer = router_cases.build(Case(router="avg-k", megatron=flags))
    group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    for step in range(3):
        x = local_tokens(router_cases.draw(step, S, BATCH, D))
        layer.router(x.flatten(0, 1), layer.experts.keys)
        _update_router_expert_bias([layer], layer.config, group)
        reset_model_temporary_tensors(layer.config, [layer])
    x = router_cases.draw(9, 40, D)
    return layer.router.balance.expert_bias, layer.router(x, layer.experts.keys).block_ids


@pytest.mark.parametrize("name", ["DP2", "TP2", "TP2 EP4"])
def test_the_expert_bias_is_the_same_on_every_layout(name: str) -> None:
    ((bias, ids),) = run_ranks(1, biases)
    assert bias.abs().max() > 0.1
    ranks, sizes = LAYOUTS[name]
    for rank_bias, rank_ids in run_ranks(ranks, biases, **sizes):
        assert torch.equal(rank_bias, bias)
        assert torch.equal(rank_ids, ids)


def prices(router: str) -> tuple[Tensor, Tensor]:
    """The prices of quantile balancing after three steps, and the blocks that a token chooses."""
    flags = (
        ("moe_router_load_balancing_type", "quantile_balancing"),
        ("moe_router_quantile_balancing_ema", 0.5),
    )
    layer = router_cases.build(Case(router=router, megatron=flags))
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    samples = BATCH // group.size()
    for step in range(3):
        # A sample is a microbatch on every layout.
        x = local_tokens(router_cases.draw(step, S, BATCH, D))
        for sample in range(samples):
            layer.router(x[:, sample], layer.experts.keys)
        _update_router_qb_beta([layer], layer.config, group)
        reset_model_temporary_tensors(layer.config, [layer])
    x = router_cases.draw(9, 40, D)
    return layer.router.balance.qb_beta, layer.router(x, layer.experts.keys).block_ids


@pytest.mark.parametrize("router", ["avg-k", "vanilla-m", "sigma-moe"])
@pytest.mark.parametrize("name", ["DP2", "TP2", "TP2 DP2", "TP2 EP4", "EP2 ETP2"])
def test_prices_are_the_same_on_every_layout(name: str, router: str) -> None:
    ((expected, ids),) = run_ranks(1, prices, router)
    assert expected.abs().max() > 0.01
    ranks, sizes = LAYOUTS[name]
    for rank_prices, rank_ids in run_ranks(ranks, prices, router, **sizes):
        torch.testing.assert_close(rank_prices, expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(rank_ids, ids)


def per_token_gradient() -> Tensor:
    """The gradient under per-token losses: summed over all ranks, then divided by all tokens."""
    case = case_of(LossCase("switch", "seq_aux_loss"))
    layer = router_cases.build(
        Case(router="switch", megatron=(*case.megatron, ("calculate_per_token_loss", True)))
    )
    x = local_tokens(router_cases.draw(1, S, BATCH, D))
    routing = layer.router(x.flatten(0, 1), layer.experts.keys, None, x.shape[1])
    torch.autograd.backward(routing.queries, torch.zeros_like(routing.queries))
    grad = layer.router.weight.grad.clone()
    torch.distributed.all_reduce(grad)
    return grad / (S * BATCH)


@pytest.mark.parametrize("name", ["DP2", "TP2", "TP2 DP2"])
def test_per_token_losses_have_the_same_gradient(name: str) -> None:
    (expected,) = losses_on(None)["switch", "seq_aux_loss"]
    for layout in (None, name):
        ranks, sizes = LAYOUTS[layout] if layout else (1, {})
        for grad in run_ranks(ranks, per_token_gradient, **sizes):
            torch.testing.assert_close(grad, expected["dweight"], rtol=1e-6, atol=1e-12)
