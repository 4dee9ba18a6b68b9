"""The layout proof: training steps on every layout equal those of one rank, in float64."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron_sffn.nn.routers import ROUTERS
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
    "TP2 EP8": Layout(world_size=8, tp=2, ep=8, dispatcher="allgather"),
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


ROUTERS_OF_ALL_LAYOUTS = ["avg-k", "vanilla-m", "rand-hash", "switch"]
"""Routers that are tested on all layouts; the other routers share their code."""
LAYOUTS_OF_ALL_ROUTERS = ["TP2 EP2 folded", "TP2 ETP2", "PP2 VPP2 EP2 moe", "TP2 PP2 full"]
"""Layouts of all routers: every kind of parallelism, both dispatchers, and recomputation."""


FAST = {"TP2 EP2 folded", "PP2 VPP2 EP2 moe", "TP2 PP2 full", "TP2 EP2 x DP2"}
"""Layouts of `make test`; the others are for `make test-slow`.

`make test` also trains on EP2 ETP2 (the ablations) and on TP2 PP2 EP4 (load balancing).
"""
FAST_OF_ALL_ROUTERS = {"TP2 EP2 folded"}
"""Layouts of `make test` for the routers that are not on all layouts.

None has pipeline stages, which hold whole layers, so that PP is the same for all routers.
"""


def pairs_to_test(layouts: dict[str, Layout]) -> list[tuple[str, str]]:
    """The (layout, router) pairs that are tested."""
    return [
        (name, router)
        for name, layout in layouts.items()
        for router in SPARSE
        if (router in ROUTERS_OF_ALL_LAYOUTS or name in LAYOUTS_OF_ALL_ROUTERS)
        and not (router in SINGLE_CELLS and layout.etp > 1)
    ]


def is_fast(name: str, router: str) -> bool:
    """True if `make test` trains the router on this layout."""
    return name in (FAST if router in ROUTERS_OF_ALL_LAYOUTS else FAST_OF_ALL_ROUTERS)


def cases(layouts: dict[str, Layout]) -> list[Any]:
    """`pairs_to_test` as parameters of a test, marked slow unless they are fast."""
    return [
        pytest.param(name, router) if is_fast(name, router) else slow(name, router)
        for name, router in pairs_to_test(layouts)
    ]


@cache
def trained(layout: Layout, variants: tuple[Variant, ...]) -> dict[Variant, Trained]:
    """Train several variants on a layout, in one set of processes."""
    results = run_ranks(layout.world_size, run, layout, list(variants), **layout.megatron_sizes())
    results_by_variant = zip(*results, strict=True)
    return {
        variant: join(list(ranks))
        for variant, ranks in zip(variants, results_by_variant, strict=True)
    }


def trained_router(name: str, router: str, layouts: dict[str, Layout]) -> Trained:
    """The result of a router; the fast and the slow cases of a layout train together."""
    fast = is_fast(name, router)
    variants = tuple(
        Variant(other_router)
        for layout, other_router in pairs_to_test(layouts)
        if layout == name and is_fast(name, other_router) == fast
    )
    return trained(layouts[name], variants)[Variant(router)]


def one_rank(router: str) -> Trained:
    """The result of a router on one rank, the oracle."""
    return trained(Layout(), tuple(map(Variant, SPARSE)))[Variant(router)]


def assert_same(
    actual: Trained, expected: Trained, rtol: float, atol: float, *, sharded: bool = False
) -> None:
    """All results agree; gradients too, unless they are sharded over data-parallel ranks."""
    assert actual.losses == pytest.approx(expected.losses, rel=rtol)
    assert actual.grad_norms == pytest.approx(expected.grad_norms, rel=max(rtol, 1e-6))
    for kind in ("grads", "weights"):
        expected_tensors, tensors = getattr(expected, kind), getattr(actual, kind)
        if kind == "grads" and sharded:
            assert not tensors
            continue
        assert tensors.keys() == expected_tensors.keys()
        for name, tensor in tensors.items():
            expected_tensor = expected_tensors[name].to(tensor.dtype)
            torch.testing.assert_close(
                tensor, expected_tensor, rtol=rtol, atol=atol, msg=f"{kind} {name}"
            )
    assert actual.balance.keys() == expected.balance.keys()
    for layer, bias in expected.balance.items():
        assert torch.equal(actual.balance[layer], bias)


@pytest.mark.parametrize(("name", "router"), cases(LAYOUTS))
def test_every_layout_trains_the_model_of_one_rank(name: str, router: str) -> None:
    assert_same(trained_router(name, router, LAYOUTS), one_rank(router), 1e-8, 1e-10)


@pytest.mark.parametrize(("name", "router"), cases(RECOMPUTED))
def test_recomputation_trains_the_model_of_one_rank(name: str, router: str) -> None:
    assert_same(trained_router(name, router, RECOMPUTED), one_rank(router), 1e-8, 1e-10)


def test_tokens_in_chunks_train_the_model_of_one_rank() -> None:
    # Each rank has 4 tokens of a microbatch; two nodes, and full recomputation.
    layout = Layout(world_size=4, tp=2, ep=4, recompute="full")
    chunks = (("exchange_chunks", 3), ("node_size", 2))
    routers = ("switch", "pkm")
    results = trained(layout, tuple(Variant(router, sffn=chunks) for router in routers))
    for router in routers:
        assert_same(results[Variant(router, sffn=chunks)], one_rank(router), 1e-8, 1e-10)


# Megatron's distributed optimizer has only fp32 and half precision. In fp32 the order of a sum of a
# hundred products changes its 6th digit, and Adam divides by small numbers.
DISTRIBUTED_OPTIMIZER = {
    name: replace(layout, distributed_optimizer=True, dtype=torch.float32)
    for name, layout in {
        "DP2": Layout(world_size=2),
        "EP2 x DP2": Layout(world_size=4, ep=2, dispatcher="allgather"),
        "TP2 EP2 x DP2": Layout(world_size=4, tp=2, ep=2),
        "PP2 VPP2 x DP2": Layout(world_size=4, pp=2, virtual_stages=2),
        "TP2 PP2 EP2 ETP2": Layout(world_size=8, tp=2, pp=2, ep=2, etp=2),
        "hybrid PP2 EP2": Layout(world_size=4, pp=2, ep=2, hybrid=True),
    }.items()
}


@pytest.mark.parametrize(("name", "router"), cases(DISTRIBUTED_OPTIMIZER))
def test_the_distributed_optimizer_trains_the_model_of_one_rank(name: str, router: str) -> None:
    actual = trained_router(name, router, DISTRIBUTED_OPTIMIZER)
    one_rank_layout = Layout(dtype=torch.float32)
    expected = trained(one_rank_layout, tuple(map(Variant, ROUTERS_OF_ALL_LAYOUTS)))
    assert_same(actual, expected[Variant(router)], 1e-3, 2e-4, sharded=True)


HYBRID = {
    name: replace(layout, hybrid=True)
    for name, layout in {
        "one rank": Layout(),
        **{name: LAYOUTS[name] for name in ("TP2 EP2 folded", "EP2 ETP2", "PP4")},
        **{name: RECOMPUTED[name] for name in ("PP2 VPP2 EP2 moe", "TP2 PP2 full")},
    }.items()
}
ROUTERS_OF_HYBRID_MODELS = ["avg-k", "rand-hash", "switch"]


@pytest.mark.parametrize("router", ROUTERS_OF_HYBRID_MODELS)
@pytest.mark.parametrize(
    "name",
    [name if name in ("TP2 EP2 folded", "PP2 VPP2 EP2 moe") else slow(name) for name in HYBRID],
)
def test_a_hybrid_model_trains_as_the_gpt_with_its_layers(name: str, router: str) -> None:
    variants = tuple(map(Variant, ROUTERS_OF_HYBRID_MODELS))
    actual = trained(HYBRID[name], variants)[Variant(router)]
    assert_same(actual, one_rank(router), 1e-8, 1e-10)


MAMBA = Variant(
    "avg-k",
    megatron=(("mamba_state_dim", 8), ("mamba_head_dim", 4), ("mamba_num_groups", 2)),
)
DELTA_NET = Variant(
    "avg-k",
    megatron=(
        *(("linear_key_head_dim", 4), ("linear_value_head_dim", 6)),
        *(("linear_num_key_heads", 2), ("linear_num_value_heads", 4)),
        *(("activation_func", F.silu), ("gated_linear_unit", True)),
    ),
)
needs_einops = pytest.mark.skipif(
    importlib.util.find_spec("einops") is None, reason="Megatron's Mamba layer needs einops"
)


@pytest.mark.parametrize(
    "name",
    [
        "TP2 PP2",
        *(slow(name) for name in ("TP2 EP2 folded", "PP2 VPP2", "EP2 ETP2", "TP2 PP2 full")),
    ],
)
@pytest.mark.parametrize(
    ("pattern", "variant"),
    [
        pytest.param("MEM*-MEE", MAMBA, marks=needs_einops, id="M"),
        pytest.param("GEG*-GEE", DELTA_NET, id="G"),
    ],
)
def test_recurrent_layers_do_not_depend_on_the_layout(
    name: str, pattern: str, variant: Variant
) -> None:
    actual, expected = (
        trained(replace(layout, hybrid=True, pattern=pattern), (variant,))[variant]
        for layout in ((LAYOUTS | RECOMPUTED)[name], Layout())
    )
    assert_same(actual, expected, 1e-8, 1e-10)


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
"""Variants with every loss of a single microbatch, and the expert bias."""


@pytest.mark.parametrize("variant", BALANCED, ids=lambda variant: variant.router)
@pytest.mark.parametrize(
    "name",
    [
        "TP2 PP2 EP4",
        *(
            slow(name)
            for name in ("DP2", "PP2 VPP2", "EP2 ETP2", "TP2 PP2 full", "hybrid EP2 ETP2")
        ),
    ],
)
def test_load_balancing_does_not_depend_on_the_layout(name: str, variant: Variant) -> None:
    expected = trained(Layout(), BALANCED)[variant]
    layout = (LAYOUTS | RECOMPUTED | {"hybrid EP2 ETP2": HYBRID["EP2 ETP2"]})[name]
    assert_same(trained(layout, BALANCED)[variant], expected, 1e-8, 1e-10)
    # Sparse layers are 1, 3 and 4; their biases have moved, by different amounts.
    assert sorted(expected.balance) == [1, 3, 4]
    assert all(len(bias.unique()) > 1 for bias in expected.balance.values())
    # The losses have an effect: without them, the weights of the scores have other gradients.
    weight = "mlp.router.weight" if variant.router == "switch" else "mlp.experts.keys"
    without_losses = one_rank(variant.router)
    keys = [key for key in expected.grads if key.endswith(weight)]
    assert keys
    for key in keys:
        assert not torch.allclose(expected.grads[key], without_losses.grads[key], rtol=1e-3)


LATENT_ATTENTION = tuple(
    Variant(
        "switch",
        megatron=(
            *(("q_lora_rank", query_rank), ("kv_lora_rank", 10), ("qk_head_dim", 6)),
            *(
                ("qk_pos_emb_head_dim", 4),
                ("v_head_dim", 8),
                ("qk_layernorm", query_rank is not None),
            ),
            ("rope_type", rope_type),
        ),
    )
    for query_rank, rope_type in ((12, "yarn"), (None, "rope"))
)


@pytest.mark.parametrize(
    "name", ["TP2 PP2 full", *(slow(f"hybrid {name}") for name in ("TP2 PP2 full", "EP2 ETP2"))]
)
@pytest.mark.parametrize("variant", LATENT_ATTENTION)
def test_multi_latent_attention_does_not_depend_on_the_layout(name: str, variant: Variant) -> None:
    layout = (RECOMPUTED | {f"hybrid {name}": HYBRID[name] for name in HYBRID})[name]
    actual, expected = (trained(layout, LATENT_ATTENTION)[variant] for layout in (layout, Layout()))
    assert_same(actual, expected, 1e-8, 1e-10)


ROUTERS_OF_LAYERS = Variant(
    "switch", sffn=(("other_routers", ((0, ROUTERS["rand-hash"]()), (1, ROUTERS["avg-k"]()))),)
)
"""A model whose three sparse layers have a router each."""


@pytest.mark.parametrize(
    ("name", "hybrid"), [("PP2 VPP2 EP2 moe", True), slow("PP2 VPP2 EP2 moe", False)]
)
def test_the_router_of_a_layer_does_not_depend_on_the_layout(name: str, hybrid: bool) -> None:
    layout = replace(RECOMPUTED[name], hybrid=hybrid)
    actual, expected = (trained(layout, (ROUTERS_OF_LAYERS,)) for layout in (layout, Layout()))
    assert_same(actual[ROUTERS_OF_LAYERS], expected[ROUTERS_OF_LAYERS], 1e-8, 1e-10)
    # Only the last layer has a gate network.
    assert [name for name in expected[ROUTERS_OF_LAYERS].weights if "router" in name] == [
        "decoder.layers.3.mlp.router.weight"
    ]
    assert expected[ROUTERS_OF_LAYERS].losses[0] != pytest.approx(one_rank("switch").losses[0])


ALL_SPARSE = (("moe_layer_freq", (1, 1, 1, 1)),)
ONE_TABLE = {
    "memory-plus": Variant("memory-plus", sffn=(("layers_per_table", 2),), megatron=ALL_SPARSE),
    "avg-k": Variant(
        "avg-k", (("gate", "sigmoid"),), sffn=(("layers_per_table", 2),), megatron=ALL_SPARSE
    ),
}
ONE_TABLE_LAYOUTS = {
    "TP2 EP2 folded": LAYOUTS["TP2 EP2 folded"],
    "EP2 ETP2": LAYOUTS["EP2 ETP2"],
    "PP2 EP2 full": Layout(world_size=4, pp=2, ep=2, recompute="full"),
    "TP2 ETP2 moe": Layout(world_size=2, tp=2, etp=2, recompute="moe"),
    "hybrid PP2 EP2": Layout(world_size=4, pp=2, ep=2, hybrid=True),
    # Each layer passes Megatron's hook of the table, which then reduces its gradient.
    "EP2 x DP2": DISTRIBUTED_OPTIMIZER["EP2 x DP2"],
    "EP2 x DP2 full": replace(DISTRIBUTED_OPTIMIZER["EP2 x DP2"], recompute="full"),
}


FAST_ONE_TABLE = {"PP2 EP2 full", "EP2 x DP2"}


@pytest.mark.parametrize(
    ("name", "router"),
    [
        (name, router) if name in FAST_ONE_TABLE else slow(name, router)
        for name, layout in ONE_TABLE_LAYOUTS.items()
        for router in ONE_TABLE
        if not (router == "memory-plus" and layout.etp > 1)
    ],
)
def test_layers_with_one_table_train_the_model_of_one_rank(name: str, router: str) -> None:
    layout, variant = ONE_TABLE_LAYOUTS[name], ONE_TABLE[router]
    variants = tuple(ONE_TABLE.values()) if layout.etp == 1 else (ONE_TABLE["avg-k"],)
    is_float64 = layout.dtype == torch.float64
    actual = trained(layout, variants)[variant]
    expected = trained(Layout(dtype=layout.dtype), tuple(ONE_TABLE.values()))[variant]
    tolerances = (1e-8, 1e-10) if is_float64 else (1e-3, 2e-4)
    assert_same(actual, expected, *tolerances, sharded=layout.distributed_optimizer)
    tables = {key for key in expected.weights if ".experts." in key}
    assert {key.split(".")[2] for key in tables} == {"0", "2"}


VARIANTS = {
    "routers of layers": ROUTERS_OF_LAYERS,
    "shared blocks": Variant("switch", sffn=(("shared_blocks", 2),)),
    "norm-weighted": Variant("avg-k", (("descriptor", "norm-weighted"), ("gate", "sigmoid"))),
    "learned": Variant("avg-k", (("descriptor", "learned"), ("gate", "sigmoid"))),
    "ema": Variant("avg-k", (("descriptor", "ema"), ("decay", 0.5))),
    "latent": Variant("avg-k", (("gate", "sigmoid"),), sffn=(("latent_size", 6),)),
    "latent, tokens scored": Variant("switch", sffn=(("latent_size", 6), ("shared_blocks", 1))),
    "attention": Variant(
        "switch",
        (("network", "attention"), ("network_width", 6)),
        factors=("values:4,gates:0.5", "values:0,keys:2"),
    ),
    "capacity": Variant("switch", megatron=(("moe_expert_capacity_factor", 0.5),)),
    "capacity by position": Variant(
        "switch",
        megatron=(("moe_expert_capacity_factor", 0.5), ("moe_token_drop_policy", "position")),
    ),
}
"""Ablations and options, each on a router that has it."""
SIMPLER_VARIANTS = {
    "shared blocks, avg-k": Variant("avg-k", sffn=(("shared_blocks", 1),)),
    "softmax gate": Variant("avg-k", (("gate", "softmax"),)),
    "max-norm": Variant("avg-k", (("descriptor", "max-norm"),)),
    "subset": Variant("avg-k", (("descriptor", "subset"), ("subset_cells", 2))),
    "mlp": Variant("sigma-moe", (("network", "mlp"), ("network_width", 6))),
}
"""Ablations for `make test-slow`: one of `VARIANTS` has the same parts and more state or gradients,
and `test_layer.py` compares the layers of these with those of one rank."""


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        *(("EP2 ETP2", variant) for variant in VARIANTS),
        *(slow("EP2 ETP2", variant) for variant in SIMPLER_VARIANTS),
        *(slow("TP2 PP2 full", variant) for variant in VARIANTS | SIMPLER_VARIANTS),
    ],
)
def test_ablations_do_not_depend_on_the_layout(name: str, variant: str) -> None:
    variants = VARIANTS if variant in VARIANTS else SIMPLER_VARIANTS
    actual, expected = (
        trained(layout, tuple(variants.values()))[variants[variant]]
        for layout in ((LAYOUTS | RECOMPUTED)[name], Layout())
    )
    assert_same(actual, expected, 1e-8, 1e-10)
