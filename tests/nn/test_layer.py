"""`SparseFFN` on one rank, compared with the oracle, Megatron's own layer, and recomputation."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.activations import quick_gelu
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules

from megatron_sffn.nn.config import Backend, SparseFFNConfig
from megatron_sffn.nn.layer import SparseFFN
from megatron_sffn.nn.routers.avg_k import AvgKConfig
from megatron_sffn.ops import block_ffn
from megatron_sffn.utils.errors import ConfigError
from tests.support.router_cases import (
    SPARSE,
    WHOLE_KEYS,
    Case,
    build,
    config_of,
    copy_tables,
    inputs,
    run,
)

pytestmark = pytest.mark.usefixtures("one_rank")


def megatron_layer(case: Case, sparse: Any) -> MoELayer:
    """Megatron's unmodified MoE layer with the weights of a sparse layer."""
    linear = LocalSpecProvider()
    submodules = MLPSubmodules(
        linear_fc1=linear.column_parallel_linear(), linear_fc2=linear.row_parallel_linear()
    )
    megatron = MoELayer(
        config_of(case), MoESubmodules(experts=partial(SequentialMLP, submodules=submodules))
    )
    megatron.set_layer_number(1)
    with torch.no_grad():
        megatron.router.weight.copy_(sparse.router.weight)
    copy_tables(sparse, megatron)
    return megatron


QUICK_GEGLU = (("activation_func", quick_gelu), ("gated_linear_unit", True))
CLAMPED = (("activation_func_clamp_value", 0.4), ("glu_linear_offset", 1.0))
ACTIVATIONS: dict[str, tuple[tuple[str, Any], ...]] = {
    "gelu": (),
    "swiglu": (),
    "swiglu, clamped": CLAMPED[:1],
    "swiglu, with an offset": CLAMPED[1:],
    "quick_geglu": QUICK_GEGLU,
    "quick_geglu, clamped": QUICK_GEGLU + CLAMPED,
}
"""Name -> fields of Megatron's config."""


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("g", [16, 4, 1])
def test_switch_agrees_with_megatrons_own_layer(g: int, activation: str) -> None:
    case = Case(
        router="switch",
        block_size=g,
        swiglu=activation.startswith("swiglu"),
        megatron=ACTIVATIONS[activation],
    )
    sparse = build(case)
    megatron = megatron_layer(case, sparse)
    hidden, _, weights = inputs()
    results = []
    for layer in (sparse, megatron):
        x = hidden.clone().requires_grad_()
        y, _ = layer(x)
        (y * weights).sum().backward()
        results.append([y.detach(), x.grad, layer.router.weight.grad])
    mlps = megatron.experts.local_experts
    results[0] += [sparse.experts.keys.grad, sparse.experts.values.grad]
    results[1] += [
        torch.stack([mlp.linear_fc1.weight.grad for mlp in mlps]),
        torch.stack([mlp.linear_fc2.weight.grad.T for mlp in mlps]),
    ]
    for actual, expected in zip(*results, strict=True):
        # Megatron computes the softmax in fp32.
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("router", SPARSE)
def test_backends_agree_with_the_oracle(router: str) -> None:
    oracle = run(Case(router=router, backend=Backend.NAIVE))
    fast = run(Case(router=router, backend=Backend.CPU))
    assert oracle.keys() == fast.keys()
    for name in oracle:
        torch.testing.assert_close(fast[name], oracle[name], rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("dispatcher", ["allgather", "alltoall"])
@pytest.mark.parametrize("router", WHOLE_KEYS)
def test_megatrons_dispatcher_and_experts_agree_with_sparse_ffn(
    router: str, dispatcher: str
) -> None:
    sparse = build(Case(router=router))
    megatron = build(
        Case(
            router=router,
            backend=Backend.MEGATRON,
            megatron=(("moe_token_dispatcher_type", dispatcher),),
        )
    )
    copy_tables(sparse, megatron)
    hidden, ids, weights = inputs()
    results = []
    for layer in (sparse, megatron):
        x = hidden.clone().requires_grad_()
        y, _ = layer(x, padding_mask=ids)
        (y * weights).sum().backward()
        results.append([y.detach(), x.grad])
    mlps = megatron.experts.local_experts
    results[0].append(sparse.experts.values.grad)
    results[1].append(torch.stack([mlp.linear_fc2.weight.grad.T for mlp in mlps]))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)


def test_clamped_halves_need_a_gated_activation_and_a_positive_clamp() -> None:
    with pytest.raises(ConfigError, match="gelu has no gate; leave them out, or use --swiglu"):
        build(Case(router="switch", megatron=CLAMPED))
    with pytest.raises(ConfigError, match="must be greater than 0; leave it out"):
        build(Case(router="switch", swiglu=True, megatron=(("activation_func_clamp_value", 0.0),)))


@pytest.mark.parametrize("router", SPARSE)
def test_recomputation_changes_no_result(router: str) -> None:
    plain = run(Case(router=router))
    recomputed = run(
        Case(
            router=router,
            megatron=(("recompute_granularity", "selective"), ("recompute_modules", ["moe"])),
        )
    )
    for name in plain:
        torch.testing.assert_close(recomputed[name], plain[name], rtol=0, atol=0, msg=name)


def test_f3_without_expansion_the_layer_is_the_dense_ffn() -> None:
    case = Case(router="avg-k")
    config = config_of(case)
    config.sffn = SparseFFNConfig(active_cells=16, block_size=4, expansion=1, router=AvgKConfig())
    config.num_moe_experts = config.sffn.num_blocks
    layer = SparseFFN(config, layer_number=1)
    hidden, _, _ = inputs()
    keys, values = layer.experts.keys.flatten(0, 1), layer.experts.values.flatten(0, 1)
    dense = torch.nn.functional.gelu(hidden @ keys.T) @ values
    torch.testing.assert_close(layer(hidden)[0], dense, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("router", SPARSE)
def test_the_layer_equals_its_router_followed_by_block_ffn(router: str) -> None:
    layer = build(Case(router=router))
    hidden, ids, _ = inputs()
    x = hidden.reshape(-1, hidden.shape[-1])
    routing = layer.router(x, layer.experts.keys, ids.T.reshape(-1))
    rows = x if routing.queries is None else routing.queries
    sums = block_ffn(rows, *layer.experts(), routing.block_ids, routing.gates)
    y = layer.router.project_sums(sums, x)
    updated, _ = layer(hidden, padding_mask=ids)
    torch.testing.assert_close(updated.flatten(0, 1), y, rtol=1e-12, atol=1e-14)


def test_training_and_evaluation_have_separate_counters() -> None:
    layer = build(Case(router="avg-k"))
    hidden, _, _ = inputs()
    chosen = hidden.shape[0] * hidden.shape[1] * 4
    layer(hidden)
    with torch.no_grad():
        layer(hidden)  # the first pass of a recomputed layer
    assert layer.trained.take().load.sum() == chosen
    layer.eval()
    layer(hidden)
    assert layer.trained.take().load.sum() == 0
    assert layer.evaluated.take().load.sum() == chosen
    assert layer.evaluated.take().load.sum() == 0


def test_a_block_size_that_does_not_divide_the_active_cells_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--sffn-block-size 5 does not divide .* 16; .* 4 or 8"):
        SparseFFNConfig(active_cells=16, block_size=5, router=AvgKConfig())


def test_initial_block_weights_have_megatrons_std() -> None:
    layer = SparseFFN(config_of(Case(router="avg-k")), layer_number=1)
    assert parallel_state.get_expert_model_parallel_world_size() == 1
    assert layer.experts.keys.std().item() == pytest.approx(0.5, rel=0.1)
    # Megatron scales the output projection by 1 / sqrt(2 · layers).
    assert layer.experts.values.std().item() == pytest.approx(0.5 / 2, rel=0.1)
    layer_2 = SparseFFN(config_of(Case(router="avg-k")), layer_number=2)
    assert not torch.equal(layer.experts.keys, layer_2.experts.keys)
    assert not torch.equal(layer.experts.keys[0], layer.experts.keys[1])


def test_tokens_reach_the_router_in_the_order_of_the_hidden_states() -> None:
    layer = build(Case(router="rand-hash"))
    hidden, ids, _ = inputs()
    router_ids = []
    layer.router.register_forward_pre_hook(lambda module, args: router_ids.append(args[2]))
    layer(hidden, padding_mask=ids)
    assert torch.equal(router_ids[0].view(hidden.shape[:2]), ids.T)
