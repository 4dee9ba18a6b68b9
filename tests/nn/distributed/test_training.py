"""The proof: on every layout, training steps compute what one rank computes, in float64."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from tests.support.engine import Layout, Trained, Variant, join, run
from tests.support.ranks import run_ranks
from tests.support.router_cases import SINGLE_CELLS, SPARSE
from tests.support.slow import slow

LAYOUTS = {
    # 2 ranks
    "DP2": Layout(world_size=2),
    "TP2": Layout(world_size=2, tp=2),
    "EP2": Layout(world_size=2, ep=2),
    "PP2": Layout(world_size=2, pp=2),
    "TP2 ETP2": Layout(world_size=2, tp=2, etp=2),
    "TP2 EP2 folded": Layout(world_size=2, tp=2, ep=2, dispatcher="allgather"),
    "PP2 VPP2": Layout(world_size=2, pp=2, virtual_stages=2),
    # 4 ranks
    "TP2 PP2": Layout(world_size=4, tp=2, pp=2),
    "EP4": Layout(world_size=4, ep=4),
    "TP2 EP4": Layout(world_size=4, tp=2, ep=4),
    "EP2 ETP2": Layout(world_size=4, ep=2, etp=2),
    "PP2 EP2": Layout(world_size=4, pp=2, ep=2, dispatcher="allgather"),
    "PP4": Layout(world_size=4, pp=4),
    # 8 ranks
    "EP8": Layout(world_size=8, ep=8, dispatcher="allgather"),
    "TP2 PP2 EP2": Layout(world_size=8, tp=2, pp=2, ep=2),
    "TP2 PP2 EP4": Layout(world_size=8, tp=2, pp=2, ep=4),
    "TP2 PP2 VPP2 EP2 ETP2": Layout(world_size=8, tp=2, pp=2, virtual_stages=2, ep=2, etp=2),
}

RECOMPUTED = {
    f"{name} {recompute}": Layout(**sizes, recompute=recompute)
    for recompute in ("full", "moe", "mlp")
    for name, sizes in {
        "one rank": {"world_size": 1},
        "TP2 PP2": {"world_size": 4, "tp": 2, "pp": 2},
        "PP2 VPP2 EP2": {"world_size": 4, "pp": 2, "virtual_stages": 2, "ep": 2},
    }.items()
}


THOROUGH = ["avg-k", "vanilla-m", "rand-hash", "switch"]
"""On all layouts; the other routers share their code."""
SOME = ["TP2 EP2 folded", "TP2 ETP2", "PP2 VPP2 EP2 moe", "TP2 PP2 full"]
"""Layouts of all routers: each kind of parallelism, both dispatchers, and recomputation."""


FAST = {*SOME, "TP2 PP2 EP4", "EP2 x DP2"}
"""Layouts of `make test`; the others are for `make test-slow`."""


def on(layouts: dict[str, Layout]) -> list[tuple[str, str]]:
    """(layout, router) for which there is a test."""
    return [
        (name, router)
        for name, layout in layouts.items()
        for router in SPARSE
        if (router in THOROUGH or name in SOME) and not (router in SINGLE_CELLS and layout.etp > 1)
    ]


def cases(layouts: dict[str, Layout]) -> list[Any]:
    """The same as parameters of a test, marked slow where the layout is not a fast one."""
    return [
        pytest.param(name, router) if name in FAST else slow(name, router)
        for name, router in on(layouts)
    ]


@cache
def trained(layout: Layout, variants: tuple[Variant, ...]) -> dict[Variant, Trained]:
    """Several layers on a layout, in one world."""
    results = run_ranks(layout.world_size, run, layout, list(variants), **layout.megatron_sizes())
    parts = zip(*results, strict=True)
    return {variant: join(list(ranks)) for variant, ranks in zip(variants, parts, strict=True)}


def of_router(name: str, router: str, layouts: dict[str, Layout]) -> Trained:
    """What a layout, with all routers that are tested on it, gives for one."""
    together = tuple(Variant(other) for where, other in on(layouts) if where == name)
    return trained(layouts[name], together)[Variant(router)]


def one_rank(router: str, **changes: Any) -> Trained:
    """The oracle."""
    return trained(Layout(**changes), tuple(map(Variant, SPARSE)))[Variant(router)]


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


@pytest.mark.parametrize(("name", "router"), cases(LAYOUTS))
def test_a_layout_trains_the_model_of_one_rank(name: str, router: str) -> None:
    assert_same(of_router(name, router, LAYOUTS), one_rank(router), 1e-8, 1e-10)


@pytest.mark.parametrize(("name", "router"), cases(RECOMPUTED))
def test_recomputation_trains_the_same_model(name: str, router: str) -> None:
    assert_same(of_router(name, router, RECOMPUTED), one_rank(router), 1e-8, 1e-10)


def test_tokens_in_chunks_train_the_same_model() -> None:
    # 4 tokens of a microbatch on each rank; on two nodes, and computed again in the backward.
    layout = Layout(world_size=4, tp=2, ep=4, recompute="full")
    chunks = (("exchange_chunks", 3), ("node_size", 2))
    routers = ("switch", "avg-k", "pkm")
    results = trained(layout, tuple(Variant(router, sffn=chunks) for router in routers))
    for router in routers:
        assert_same(results[Variant(router, sffn=chunks)], one_rank(router), 1e-8, 1e-10)


# Megatron's distributed optimizer has fp32 and half precision only: sums of products of a hundred
# numbers differ by their order in the 6th digit, and Adam divides by small ones.
DISTRIBUTED_OPTIMIZER = {
    name: replace(layout, distributed_optimizer=True, dtype=torch.float32)
    for name, layout in {
        "DP2": Layout(world_size=2),
        "EP2 x DP2": Layout(world_size=4, ep=2, dispatcher="allgather"),
        "TP2 EP2 x DP2": Layout(world_size=4, tp=2, ep=2),
        "PP2 VPP2 x DP2": Layout(world_size=4, pp=2, virtual_stages=2),
        "TP2 PP2 EP2 ETP2": Layout(world_size=8, tp=2, pp=2, ep=2, etp=2),
    }.items()
}


@pytest.mark.parametrize(("name", "router"), cases(DISTRIBUTED_OPTIMIZER))
def test_the_distributed_optimizer_trains_the_same_model(name: str, router: str) -> None:
    found = of_router(name, router, DISTRIBUTED_OPTIMIZER)
    assert_same(found, one_rank(router, dtype=torch.float32), 1e-3, 2e-4, sharded=True)


LOSSES = (
    ("moe_router_load_balancing_type", ("aux_loss", "seq_aux_loss")),
    ("moe_aux_loss_coeff", (0.05, 0.05)),
    ("moe_z_loss_coeff", 0.01),
    ("moe_router_enable_expert_bias", True),
    ("moe_router_bias_update_rate", 0.01),
)
BALANCED = (
    Variant("switch", megatron=LOSSES),
    Variant("avg-k", megatron=LOSSES),
    Variant("vanilla-m", (("gate", "sigmoid"),), megatron=LOSSES),
    Variant("lorkm", megatron=LOSSES),
)
"""Layers with every loss that is of one microbatch, and the bias."""


@pytest.mark.parametrize("variant", BALANCED, ids=lambda variant: variant.router)
@pytest.mark.parametrize(
    "name",
    [
        "TP2 PP2 EP4",
        *(slow(name) for name in ("DP2", "PP2 VPP2", "EP2 ETP2", "TP2 PP2 full")),
    ],
)
def test_balance_does_not_depend_on_the_layout(name: str, variant: Variant) -> None:
    one, layout = trained(Layout(), BALANCED)[variant], (LAYOUTS | RECOMPUTED)[name]
    assert_same(trained(layout, BALANCED)[variant], one, 1e-8, 1e-10)
    # Sparse layers are 1, 3 and 4; biases have moved, and not all alike.
    assert sorted(one.balance) == [1, 3, 4]
    assert all(len(bias.unique()) > 1 for bias in one.balance.values())
    # The losses act: without them the weights that make the scores are others.
    scores = "mlp.router.weight" if variant.router == "switch" else "mlp.experts.keys"
    plain = one_rank(variant.router)
    changed = [name for name in one.grads if name.endswith(scores)]
    assert changed
    assert not any(torch.allclose(one.grads[n], plain.grads[n], rtol=1e-3) for n in changed)


VARIANTS = {
    "shared blocks": Variant("avg-k", sffn=(("shared_blocks", 1),)),
    "shared blocks, switch": Variant("switch", sffn=(("shared_blocks", 2),)),
    "softmax gate": Variant("avg-k", (("gate", "softmax"),)),
    "max-norm": Variant("avg-k", (("descriptor", "max-norm"),)),
    "norm-weighted": Variant("avg-k", (("descriptor", "norm-weighted"), ("gate", "sigmoid"))),
    "learned": Variant("avg-k", (("descriptor", "learned"), ("gate", "sigmoid"))),
    "subset": Variant("avg-k", (("descriptor", "subset"), ("subset_cells", 2))),
    "ema": Variant("avg-k", (("descriptor", "ema"), ("decay", 0.5))),
    "mlp": Variant("sigma-moe", (("network", "mlp"), ("network_width", 6))),
    "attention": Variant("switch", (("network", "attention"), ("network_width", 6))),
    "capacity": Variant("switch", megatron=(("moe_expert_capacity_factor", 0.5),)),
    "capacity by position": Variant(
        "switch",
        megatron=(("moe_expert_capacity_factor", 0.5), ("moe_token_drop_policy", "position")),
    ),
}
"""Ablations."""


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["EP2 ETP2", slow("TP2 PP2 full")])
def test_an_ablation_does_not_depend_on_the_layout(name: str, variant: str) -> None:
    layout, together = (LAYOUTS | RECOMPUTED)[name], tuple(VARIANTS.values())
    found = trained(layout, together)[VARIANTS[variant]]
    assert_same(found, trained(Layout(), together)[VARIANTS[variant]], 1e-8, 1e-10)
