"""Balance losses over ranks: the value and the gradient are those of one rank that has it all.

Megatron sums gradients over tensor-parallel ranks and averages them over data-parallel ones, also
those of experts, whose ranks already have what the tokens of their group give.
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
    reset_model_temporary_tensors,
)
from torch import Tensor

from tests.support import router_cases
from tests.support.ranks import run_ranks
from tests.support.router_cases import BATCH, Case, D, S

WEIGHT = 0.3
KINDS = ["aux_loss", "seq_aux_loss", "global_aux_loss", "z_loss", "entropy_loss"]
ROUTERS = ["switch", "sigma-moe", "avg-k", "vanilla-m", "lorkm"]
"""Of a gate network, and of scores that are made of keys of all ranks."""


def groups(tensor: int = 1, expert: int = 1, cells: int = 1) -> dict[str, int]:
    """Arguments of `initialize_model_parallel`."""
    return {
        "tensor_model_parallel_size": tensor,
        "expert_model_parallel_size": expert,
        "expert_tensor_parallel_size": cells,
    }


LAYOUTS = {
    "DP2": (2, groups()),
    "DP4": (4, groups()),
    "TP2": (2, groups(tensor=2)),
    "TP2 DP2": (4, groups(tensor=2)),
    "EP2": (2, groups(expert=2)),
    "EP4": (4, groups(expert=4)),
    "TP2 EP4": (4, groups(tensor=2, expert=4)),
    "EP2 ETP2": (4, groups(expert=2, cells=2)),
}


@dataclass(frozen=True)
class Balanced:
    """A loss of a router.

    Args:
        router: name.
        kind: of the loss.
        pieces: as many microbatches has one rank of the whole batch in a step; over data-parallel
            ranks each has one of them.
    """

    router: str
    kind: str
    pieces: int = 1


def case_of(of: Balanced) -> Case:
    options: tuple[tuple[str, Any], ...] = ()
    flags: tuple[tuple[str, Any], ...] = ()
    if of.kind == "entropy_loss":
        options = (("entropy_coefficient", WEIGHT),)
    elif of.kind == "z_loss":
        flags = (("moe_z_loss_coeff", WEIGHT),)
    else:
        flags = (("moe_router_load_balancing_type", of.kind), ("moe_aux_loss_coeff", WEIGHT))
    if of.kind in ("entropy_loss", "z_loss"):
        flags += (("moe_router_load_balancing_type", "none"),)
    return Case(router=of.router, options=options, megatron=flags)


def part(hidden: Tensor) -> Tensor:
    """This rank's tokens of `[S, b, D]`."""
    data = parallel_state.get_data_parallel_group()
    tensor = parallel_state.get_tensor_model_parallel_group()
    hidden = hidden.chunk(data.size(), dim=1)[data.rank()]
    return hidden.chunk(tensor.size())[tensor.rank()]


def losses(several: list[Balanced]) -> list[dict[str, Tensor]]:
    """For each: the loss, and its gradients in the router's weights and the keys, of the world."""
    results = []
    data = parallel_state.get_data_parallel_world_size()
    for of in several:
        layer = router_cases.build(case_of(of))
        for piece in router_cases.draw(1, S, BATCH, D).chunk(of.pieces, dim=1):
            x = part(piece)
            routing = layer.router(x.flatten(0, 1), layer.experts.keys, None, x.shape[1])
            # Nothing but the loss has a gradient.
            torch.autograd.backward(routing.queries, torch.zeros_like(routing.queries))
        result = dict(layer.router.balance.take_values())
        result |= {
            f"d{name}": weight.grad
            for name, weight in layer.router.named_parameters()
            if weight.grad is not None
        }
        for name, value in result.items():
            value = value.double() / of.pieces / data
            torch.distributed.all_reduce(value)
            result[name] = value
        if layer.experts.keys.grad is not None:
            result["dkeys"] = whole_keys(layer) / of.pieces / data
        results.append(result)
    return results


def whole_keys(layer: Any) -> Tensor:
    """`[B, G, width]` the gradient of the keys, put together from the ranks that hold them."""
    grid, grad = layer.experts.expert_grid, layer.experts.keys.grad.clone()
    torch.distributed.all_reduce(grad, group=parallel_state.get_expert_data_parallel_group())
    return torch.cat(grid.parts(grad).unbind(1), dim=1)


@cache
def on(name: str | None, pieces: int = 1) -> dict[tuple[str, str], list[dict[str, Tensor]]]:
    """`losses` of every router and kind, of each rank of a layout; None for one rank."""
    several = [Balanced(router, kind, pieces) for router in ROUTERS for kind in KINDS]
    ranks, sizes = LAYOUTS[name] if name else (1, {})
    results = zip(*run_ranks(ranks, losses, several, **sizes), strict=True)
    return {(of.router, of.kind): list(each) for of, each in zip(several, results, strict=True)}


def data_parallel(name: str) -> int:
    ranks, sizes = LAYOUTS[name]
    return ranks // sizes["tensor_model_parallel_size"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_m4_a_loss_and_its_gradient_are_those_of_one_rank(
    name: str, router: str, kind: str
) -> None:
    # `aux_loss` is of a microbatch: one rank has a microbatch for each data-parallel rank.
    pieces = data_parallel(name) if kind == "aux_loss" else 1
    (expected,) = on(None, pieces)[router, kind]
    assert any(key.startswith("d") for key in expected)
    for result in on(name)[router, kind]:
        assert result.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(result[key], value, rtol=1e-6, atol=1e-10, msg=key)
            if key.startswith("d"):
                assert value.abs().max() > 1e-6, key


@pytest.mark.parametrize("kind", ["z_loss", "entropy_loss"])
def test_m4_without_counts_it_is_so_to_the_last_digits(kind: str) -> None:
    for router in ROUTERS:
        (expected,) = on(None)[router, kind]
        for result in on("TP2 EP4")[router, kind]:
            for key, value in expected.items():
                torch.testing.assert_close(result[key], value, rtol=1e-10, atol=1e-13, msg=key)


def test_the_loss_of_a_microbatch_is_another_than_that_of_the_batch() -> None:
    # Else the two tests above could not tell F of a rank from F of all.
    for router in ROUTERS:
        (whole,), (cut,) = on(None)[router, "aux_loss"], on(None, 2)[router, "aux_loss"]
        name = "load_balancing_loss"
        assert not torch.allclose(whole[name], cut[name], rtol=1e-3)
        (over_all,) = on(None)[router, "global_aux_loss"]
        torch.testing.assert_close(over_all["global_" + name], whole[name])


def steps() -> list[Tensor]:
    """The global loss of each microbatch of two steps of three, averaged over ranks."""
    layer = router_cases.build(case_of(Balanced("switch", "global_aux_loss")))
    found = []
    for step in range(2):
        for microbatch in range(3):
            x = part(router_cases.draw(10 * step + microbatch, S, BATCH, D))
            layer.router(x.flatten(0, 1), layer.experts.keys, None, x.shape[1])
            (value,) = layer.router.balance.take_values().values()
            value = value / parallel_state.get_data_parallel_world_size()
            torch.distributed.all_reduce(value)
            found.append(value)
        reset_model_temporary_tensors(layer.config, [layer])
    return found


@pytest.mark.parametrize("name", ["DP2", "TP2 DP2", "EP4"])
def test_the_global_loss_adds_up_microbatches_of_all_ranks(name: str) -> None:
    (expected,) = run_ranks(1, steps)
    ranks, sizes = LAYOUTS[name]
    for found in run_ranks(ranks, steps, **sizes):
        torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=1e-6, atol=0)


def biases() -> tuple[Tensor, Tensor]:
    """The bias after three steps, and what it makes this rank choose."""
    flags = (("moe_router_enable_expert_bias", True), ("moe_router_bias_update_rate", 0.05))
    layer = router_cases.build(Case(router="avg-k", megatron=flags))
    group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    for step in range(3):
        x = part(router_cases.draw(step, S, BATCH, D))
        layer.router(x.flatten(0, 1), layer.experts.keys)
        _update_router_expert_bias([layer], layer.config, group)
        reset_model_temporary_tensors(layer.config, [layer])
    x = router_cases.draw(9, 40, D)
    return layer.router.balance.expert_bias, layer.router(x, layer.experts.keys).block_ids


@pytest.mark.parametrize("name", ["DP2", "TP2", "TP2 EP4"])
def test_the_bias_is_the_same_on_every_layout(name: str) -> None:
    ((bias, ids),) = run_ranks(1, biases)
    assert bias.abs().max() > 0.1
    ranks, sizes = LAYOUTS[name]
    for other, chosen in run_ranks(ranks, biases, **sizes):
        assert torch.equal(other, bias)
        assert torch.equal(chosen, ids)


def per_token() -> Tensor:
    """Gradients under per-token losses: summed over all ranks, then divided by all tokens."""
    case = case_of(Balanced("switch", "seq_aux_loss"))
    layer = router_cases.build(
        Case(router="switch", megatron=(*case.megatron, ("calculate_per_token_loss", True)))
    )
    x = part(router_cases.draw(1, S, BATCH, D))
    routing = layer.router(x.flatten(0, 1), layer.experts.keys, None, x.shape[1])
    torch.autograd.backward(routing.queries, torch.zeros_like(routing.queries))
    grad = layer.router.weight.grad.clone()
    torch.distributed.all_reduce(grad)
    return grad / (S * BATCH)


@pytest.mark.parametrize("name", ["DP2", "TP2", "TP2 DP2"])
def test_per_token_losses_have_the_same_gradient(name: str) -> None:
    (expected,) = on(None)["switch", "seq_aux_loss"]
    for world in (None, name):
        ranks, sizes = LAYOUTS[world] if world else (1, {})
        for grad in run_ranks(ranks, per_token, **sizes):
            torch.testing.assert_close(grad, expected["dweight"], rtol=1e-6, atol=1e-12)
