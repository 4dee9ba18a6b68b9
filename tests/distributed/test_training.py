"""The proof: on every layout, five training steps compute what one rank computes, in float64."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from tests.distributed.engine import Layout, Trained, join, run
from tests.layers import SPARSE
from tests.ranks import run_ranks

LAYOUTS = {
    # 2 ranks
    "DP2": Layout(ranks=2),
    "TP2": Layout(ranks=2, tensor=2),
    "EP2": Layout(ranks=2, expert=2),
    "PP2": Layout(ranks=2, pipeline=2),
    "TP2 ETP2": Layout(ranks=2, tensor=2, cells=2),
    "TP2 EP2 folded": Layout(ranks=2, tensor=2, expert=2, dispatcher="allgather"),
    "PP2 VPP2": Layout(ranks=2, pipeline=2, chunks=2),
    # 4 ranks
    "TP2 PP2": Layout(ranks=4, tensor=2, pipeline=2),
    "EP4": Layout(ranks=4, expert=4),
    "TP2 EP4": Layout(ranks=4, tensor=2, expert=4),
    "EP2 ETP2": Layout(ranks=4, expert=2, cells=2),
    "PP2 EP2": Layout(ranks=4, pipeline=2, expert=2, dispatcher="allgather"),
    "PP4": Layout(ranks=4, pipeline=4),
    # 8 ranks
    "EP8": Layout(ranks=8, expert=8, dispatcher="allgather"),
    "TP2 PP2 EP2": Layout(ranks=8, tensor=2, pipeline=2, expert=2),
    "TP2 PP2 EP4": Layout(ranks=8, tensor=2, pipeline=2, expert=4),
    "TP2 PP2 VPP2 EP2 ETP2": Layout(ranks=8, tensor=2, pipeline=2, chunks=2, expert=2, cells=2),
}

RECOMPUTED = {
    f"{name} {recompute}": Layout(**sizes, recompute=recompute)
    for recompute in ("full", "moe", "mlp")
    for name, sizes in {
        "one rank": {"ranks": 1},
        "TP2 PP2": {"ranks": 4, "tensor": 2, "pipeline": 2},
        "PP2 VPP2 EP2": {"ranks": 4, "pipeline": 2, "chunks": 2, "expert": 2},
    }.items()
}


@cache
def trained(layout: Layout, megatron: tuple[tuple[str, Any], ...] = ()) -> dict[str, Trained]:
    """Every router on a layout, in one world."""
    results = run_ranks(layout.ranks, run, layout, SPARSE, dict(megatron), **layout.groups())
    return {router: join([rank[index] for rank in results]) for index, router in enumerate(SPARSE)}


def assert_same(
    found: Trained, expected: Trained, rtol: float, atol: float, *, sharded: bool = False
) -> None:
    """Everything agrees; gradients too, unless they are sharded over replicas."""
    assert found.losses == pytest.approx(expected.losses, rel=rtol)
    assert found.grad_norms == pytest.approx(expected.grad_norms, rel=max(rtol, 1e-6))
    for kind in ("grads", "weights"):
        theirs, ours = getattr(expected, kind), getattr(found, kind)
        if kind == "grads" and sharded:
            assert not ours
            continue
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            torch.testing.assert_close(
                ours[name], value.to(ours[name].dtype), rtol=rtol, atol=atol, msg=f"{kind} {name}"
            )
    assert found.balance.keys() == expected.balance.keys()
    for layer, bias in expected.balance.items():
        assert torch.equal(found.balance[layer], bias)


@pytest.mark.parametrize("router", SPARSE)
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_trains_the_model_of_one_rank(name: str, router: str) -> None:
    assert_same(trained(LAYOUTS[name])[router], trained(Layout())[router], 1e-8, 1e-10)


@pytest.mark.parametrize("router", SPARSE)
@pytest.mark.parametrize("name", RECOMPUTED)
def test_recomputation_trains_the_same_model(name: str, router: str) -> None:
    assert_same(trained(RECOMPUTED[name])[router], trained(Layout())[router], 1e-8, 1e-10)


# Megatron's distributed optimizer has fp32 and half precision only: sums of products of a hundred
# numbers differ by their order in the 6th digit, and Adam divides by small ones.
DISTRIBUTED_OPTIMIZER = {
    "DP2": Layout(ranks=2),
    "EP2 x DP2": Layout(ranks=4, expert=2, dispatcher="allgather"),
    "TP2 EP2 x DP2": Layout(ranks=4, tensor=2, expert=2),
    "PP2 VPP2 x DP2": Layout(ranks=4, pipeline=2, chunks=2),
    "TP2 PP2 EP2 ETP2": Layout(ranks=8, tensor=2, pipeline=2, expert=2, cells=2),
}


@pytest.mark.parametrize("router", SPARSE)
@pytest.mark.parametrize("name", DISTRIBUTED_OPTIMIZER)
def test_the_distributed_optimizer_trains_the_same_model(name: str, router: str) -> None:
    layout = replace(DISTRIBUTED_OPTIMIZER[name], distributed_optimizer=True, dtype=torch.float32)
    one = trained(Layout(dtype=torch.float32))[router]
    assert_same(trained(layout)[router], one, 1e-3, 2e-4, sharded=True)


BALANCED = (
    ("moe_z_loss_coeff", 0.01),
    ("moe_router_enable_expert_bias", True),
    ("moe_router_bias_update_rate", 0.01),
)


@pytest.mark.parametrize(
    "name",
    ["DP2", "TP2", "PP2 VPP2", "EP2 ETP2", "PP2 EP2", "TP2 PP2 EP4", "TP2 PP2 full"],
)
def test_balance_does_not_depend_on_the_layout(name: str) -> None:
    one, layout = trained(Layout(), BALANCED)["switch"], (LAYOUTS | RECOMPUTED)[name]
    assert_same(trained(layout, BALANCED)["switch"], one, 1e-8, 1e-10)
    # Sparse layers are 1, 3 and 4; biases have moved, and not all alike.
    assert sorted(one.balance) == [1, 3, 4]
    assert all(len(bias.unique()) > 1 for bias in one.balance.values())
    # Both losses act: without them the gate's weights are others.
    plain = trained(Layout())["switch"]
    gate = "decoder.layers.0.mlp.router.weight"
    assert not torch.allclose(one.weights[gate], plain.weights[gate], rtol=1e-3)
