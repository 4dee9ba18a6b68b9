"""Parameters and FLOPs against the papers' tables and against built modules."""

from __future__ import annotations

import dataclasses
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from megatron.training.arguments import add_megatron_arguments
from megatron.training.training import num_floating_point_operations
from torch.utils.flop_counter import FlopCounterMode

from megatron_sffn import accounting
from megatron_sffn.accounting import ModelShape
from megatron_sffn.accounting.recurrent import DeltaNet, Mamba
from megatron_sffn.nn.config import Backend
from megatron_sffn.nn.layer import sparse_layers
from megatron_sffn.nn.routers import ROUTERS
from megatron_sffn.nn.routers.memory_plus import MemoryPlusConfig
from megatron_sffn.nn.routers.vanilla_m import KeyTableConfig
from megatron_sffn.ops.block_ffn import cpu
from tests.accounting.models import (
    DENSE,
    LATENT,
    SEVERAL_ROUTERS,
    SINGLE_KEY,
    SMALL,
    SPARSE,
    batch,
    build,
    paper,
    sparse,
)

# Megatron gives these warnings about its own calls.
pytestmark = [
    pytest.mark.filterwarnings("ignore:MLP requires ffn_hidden_size:DeprecationWarning:megatron"),
    pytest.mark.filterwarnings("ignore:.*tp_group is None:DeprecationWarning:megatron"),
    pytest.mark.filterwarnings("ignore:'type' is deprecated:DeprecationWarning"),
]


def training_zflops(shape: ModelShape) -> float:
    """ZFLOPs of the paper's 60 B tokens, with activation recomputation."""
    return 60e9 * accounting.training_flops_per_token(shape, recompute=True) / 1e21


# X1: block size, gate FLOPs per token and layer, ZFLOPs, percent over dense.
PAPER_TABLE = [
    (4096, 32_768, "0.2118", "0.015"),
    (2048, 65_536, "0.2119", "0.030"),
    (1024, 131_072, "0.2119", "0.059"),
    (256, 524_288, "0.2123", "0.238"),
    (64, 2_097_152, "0.2138", "0.951"),
    (1, 134_217_728, "0.3406", "60.8"),
]


@pytest.mark.parametrize(("block_size", "gate", "total", "percent"), PAPER_TABLE)
@pytest.mark.parametrize("router", ["avg-k", "switch"])
def test_every_block_size_has_the_flops_of_the_papers_table(
    router: str, block_size: int, gate: int, total: str, percent: str
) -> None:
    shape = paper(router, block_size)
    overhead = 100 * (
        training_zflops(shape) / training_zflops(accounting.dense_equivalent(shape)) - 1
    )
    assert accounting.flops_per_token(shape).router == 4 * gate
    assert f"{training_zflops(shape):.4f}" == total
    assert f"{overhead:.{len(percent.partition('.')[2])}f}" == percent


@pytest.mark.parametrize(("expansion", "total"), [(16, "0.3326"), (4, "0.2360")])
@pytest.mark.parametrize("block_size", [1, 256])
def test_vanilla_m_has_the_flops_of_the_paper(block_size: int, expansion: int, total: str) -> None:
    assert f"{training_zflops(paper('vanilla-m', block_size, expansion)):.4f}" == total


def test_low_rank_and_product_keys_have_the_flops_of_the_papers_formulas() -> None:
    low_rank, width, cells = paper("lorkm", 1), 1024, 65_536
    formula = 2 * width * 128 + 2 * 128 * cells + 2 * width * 4096
    assert per_layer(low_rank) == formula
    # One head of 256 numbers: each half is multiplied with sqrt(M) sub-keys of 128 numbers.
    # M = 65,536 has too few sub-keys for k = 4096, so E is 4096.
    keys = paper("pkm-ffn", 1, 4096)
    assert per_layer(keys) == 2 * width * 256 + 2 * 256 * 4096 + 2 * width * 4096


def per_layer(shape: ModelShape) -> int:
    """FLOPs of the feed-forward and the router of one sparse layer."""
    flops, dense = accounting.flops_per_token(shape), accounting.dense_equivalent(shape)
    other_layers = accounting.flops_per_token(dense).feed_forward * 20 // 24
    return (flops.feed_forward - other_layers + flops.router) // 4


def test_the_dense_model_has_the_flops_of_narayanans_formula() -> None:
    dense, h, s, v = accounting.dense_equivalent(paper()), 1024, 2048, 50257
    formula = 96 * 24 * h**2 * (1 + s / (6 * h) + v / (16 * 24 * h))
    assert accounting.training_flops_per_token(dense, recompute=True) == pytest.approx(formula)
    assert accounting.flops_per_token(dense).total == 24 * 24 * h**2 + 24 * 4 * s * h + 2 * h * v
    assert f"{training_zflops(dense):.4f}" == "0.2118"


def test_a_hash_router_has_no_flops() -> None:
    shape = paper("rand-hash", 64)
    dense = accounting.dense_equivalent(shape)
    assert accounting.flops_per_token(shape) == accounting.flops_per_token(dense)
    assert accounting.overhead_over_dense(shape) == 0


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("expansion", [4, 16])
def test_block_compute_depends_on_neither_block_size_nor_expansion(
    expansion: int, gated: bool
) -> None:
    shapes = [
        dataclasses.replace(paper("avg-k", g, expansion), gated=gated) for g, *_ in PAPER_TABLE
    ]
    dense = accounting.dense_equivalent(shapes[0])
    for shape in shapes:
        assert accounting.flops_per_token(shape).feed_forward == (
            accounting.flops_per_token(dense).feed_forward
        )
        assert accounting.count_parameters(shape) == accounting.count_parameters(shapes[0])
    block_compute = accounting.flops_per_token(dense).feed_forward // 24
    assert block_compute == (25_165_824 if gated else 16_777_216)


def test_shared_blocks_add_parameters_and_count_as_active() -> None:
    shape = paper("avg-k", 256)
    assert shape.sffn is not None
    shared = dataclasses.replace(shape, sffn=dataclasses.replace(shape.sffn, shared_blocks=3))
    before, after = accounting.count_parameters(shape), accounting.count_parameters(shared)
    assert after.total - before.total == 4 * 3 * 256 * 2 * 1024
    assert after.active == before.active
    assert accounting.flops_per_token(shared) == accounting.flops_per_token(shape)


def test_training_without_recomputation_costs_three_forward_passes() -> None:
    shape = paper()
    forward = accounting.flops_per_token(shape).total
    assert accounting.training_flops_per_token(shape, recompute=False) == 3 * forward


MAMBA = Mamba(mamba_head_dim=6, mamba_state_dim=10, mamba_num_groups=2)
DELTA_NET = DeltaNet(
    linear_conv_kernel_dim=3,
    linear_key_head_dim=5,
    linear_value_head_dim=7,
    linear_num_key_heads=2,
    linear_num_value_heads=6,
)
RECURRENT: dict[str, dict[str, Any]] = {
    "hybrid-mamba": {
        "num_layers": 5,
        "attention_layers": 1,
        "sparse_layers": 1,
        "recurrent": "MM",
        "mamba": MAMBA,
        "sffn": sparse("switch"),
    },
    "hybrid-mamba-heads-predicts-2": {
        "num_layers": 4,
        "attention_layers": 1,
        "recurrent": "M",
        "mamba": dataclasses.replace(MAMBA, mamba_num_heads=14),
        "predicted_tokens": 2,
        "prediction": "MG-",
        "delta_net": DELTA_NET,
        "gated": True,
        "layernorm": False,
    },
    "hybrid-delta-net": {
        "num_layers": 5,
        "attention_layers": 1,
        "sparse_layers": 1,
        "recurrent": "GG",
        "delta_net": DELTA_NET,
        "gated": True,
        "sffn": sparse("avg-k"),
    },
}
"""Models with recurrent layers, as changes of `SMALL`."""
MODELS: dict[str, dict[str, Any]] = {
    **DENSE,
    **RECURRENT,
    "dense-repeats-prediction": {
        "predicted_tokens": 3,
        "prediction": "*-",
        "repeats_prediction": True,
    },
    "switch-predicts-2": {
        "predicted_tokens": 2,
        "prediction": "*E",
        "sparse_layers": 2,
        "sffn": sparse("switch", shared_blocks=2),
    },
    "avg-k-predicts-latent": {
        "predicted_tokens": 1,
        "prediction": "*E",
        "sparse_layers": 1,
        "sffn": sparse(latent_size=10),
        "gated": True,
    },
    "dense-predicts-2": {
        "predicted_tokens": 2,
        "prediction": "*-",
        "tied_embeddings": False,
        "bias": False,
    },
    "avg-k-every-2": {"sparse_layers": 2, "sffn": sparse(), "learned_positions": 20},
    "avg-k-single-cells": {
        "sparse_layers": 2,
        "sffn": sparse(active_cells=40, block_size=1, expansion=2),
        "gated": True,
        "tied_embeddings": False,
    },
    "avg-k-learned-descriptor": {
        "sparse_layers": 1,
        "sffn": sparse(options={"descriptor": "learned", "gate": "sigmoid"}),
    },
    "switch-no-bias": {"sparse_layers": 2, "sffn": sparse("switch"), "bias": False},
    "switch-on-megatron": {
        "sparse_layers": 2,
        "sffn": sparse("switch", backend=Backend.MEGATRON),
    },
    "switch-on-megatron-shared": {
        "sparse_layers": 2,
        "sffn": sparse("switch", backend=Backend.MEGATRON, shared_blocks=2),
    },
    "avg-k-latent-attention": {
        "latent_attention": LATENT,
        "sparse_layers": 2,
        "sffn": sparse("avg-k"),
    },
    "hybrid-predicts-2": {
        "num_layers": 3,
        "attention_layers": 1,
        "sparse_layers": 1,
        "predicted_tokens": 2,
        "prediction": "EE*-",
        "sffn": sparse("switch"),
        "tied_embeddings": False,
    },
    "hybrid-dense": {"num_layers": 5, "attention_layers": 2, "gated": True},
    "hybrid-avg-k": {
        "num_layers": 7,
        "attention_layers": 3,
        "sparse_layers": 2,
        "sffn": sparse("avg-k"),
        "tied_embeddings": False,
    },
    "hybrid-switch-swiglu-shared": {
        "num_layers": 3,
        "attention_layers": 1,
        "sparse_layers": 2,
        "sffn": sparse("switch", shared_blocks=2),
        "gated": True,
        "layernorm": False,
        "bias": False,
    },
    "several-routers": {"num_layers": 3, "sparse_layers": 3, "sffn": SEVERAL_ROUTERS},
    "avg-k-one-table": {"sparse_layers": 2, "sffn": sparse(layers_per_table=2)},
    "hybrid-one-table-predicts": {
        "num_layers": 4,
        "attention_layers": 2,
        "sparse_layers": 2,
        "predicted_tokens": 1,
        "prediction": "*E",
        "sffn": sparse(layers_per_table=2),
    },
    "memory-plus-one-table-predicts": {
        "sparse_layers": 2,
        "predicted_tokens": 1,
        "prediction": "*E",
        "sffn": sparse("memory-plus", layers_per_table=2),
    },
    "avg-k-latent": {"sparse_layers": 2, "sffn": sparse(latent_size=10)},
    "lorkm-latent": {"sparse_layers": 1, "sffn": sparse("lorkm", latent_size=10)},
    "switch-latent-swiglu-shared": {
        "sparse_layers": 2,
        "sffn": sparse("switch", latent_size=10, shared_blocks=2),
        "gated": True,
    },
    "vanilla-m-latent": {"sparse_layers": 2, "sffn": sparse("vanilla-m", latent_size=10)},
    "sigma-moe-mlp": {
        "sparse_layers": 1,
        "sffn": sparse("sigma-moe", {"network": "mlp", "network_width": 11}),
    },
    "noisy-top-k-attention": {
        "sparse_layers": 1,
        "sffn": sparse("noisy-top-k", {"network": "attention", "network_width": 11}),
    },
}
for router in SPARSE:
    for shared in (0, 2):
        for gated in (False,) if router in SINGLE_KEY else (False, True):
            name = f"{router}{'-swiglu' if gated else ''}{'-shared' if shared else ''}"
            layer = sparse(router, shared_blocks=shared)
            MODELS[name] = {"sparse_layers": 2, "sffn": layer, "gated": gated}

# The FLOPs of its descriptor are spent once for all tokens, so they are not counted per token.
LEARNED_DESCRIPTOR = ["avg-k-learned-descriptor"]


@pytest.mark.parametrize("name", MODELS)
def test_counted_parameters_are_those_of_the_built_model(name: str, one_rank: None) -> None:
    shape = dataclasses.replace(SMALL, **MODELS[name])
    if "M" in shape.recurrent:
        pytest.importorskip("einops", reason="Megatron's Mamba layer needs einops")
    count = accounting.count_parameters(shape)
    assert count.total == sum(parameter.numel() for parameter in build(shape).parameters())


@pytest.mark.parametrize("name", MODELS)
def test_active_parameters_leave_out_the_inactive_blocks(name: str) -> None:
    shape = dataclasses.replace(SMALL, **MODELS[name])
    count, sffn = accounting.count_parameters(shape), shape.sffn
    if sffn is None:
        assert count.active == count.total
        return
    inactive_cells = (sffn.num_blocks - sffn.num_active_blocks) * sffn.block_size
    if sffn.other_routers:
        assert count.total - count.active == sum(
            layers * inactive_cells * layer.sparse_cell for layer, _, layers in shape.by_router(0)
        )
        return
    keys = (2 if shape.gated else 1) * sffn.key_width(shape.hidden_size)
    sparse_layers = shape.sparse_layers
    predicted = shape.own_predictions * shape.prediction.count("E")
    inactive_cells *= sparse_layers + predicted
    if sffn.layers_per_table > 1:
        cells = (sparse_layers // sffn.layers_per_table + predicted) * sffn.num_cells
        inactive_cells = max(0, cells - (sparse_layers + predicted) * sffn.active_cells)
    width = keys + (sffn.latent_size or shape.hidden_size)
    assert count.total - count.active == inactive_cells * width


def recomputed_keys(shape: ModelShape) -> int:
    """FLOPs per token of the forward pass that our layer computes and the papers do not count."""
    # The products with the chosen blocks' keys, which the router has computed already.
    keys = 2 if shape.gated else 1
    return sum(
        2 * count * keys * sffn.key_width(shape.hidden_size) * sffn.chosen_cells
        for _, sffn, count in shape.by_router(0)
        if isinstance(sffn.router, KeyTableConfig)
    )


def flops_after_blocks(shape: ModelShape) -> int:
    """FLOPs per token of a router that it computes after the blocks, outside its forward pass."""
    if shape.sffn is None or not isinstance(shape.sffn.router, MemoryPlusConfig):
        return 0
    return shape.layers_with(shape.predicted_tokens).sparse * 4 * shape.hidden_size**2


def flops_of_empty_slots(model: torch.nn.Module, shape: ModelShape, tokens: int) -> float:
    """FLOPs per token of the slots that a router left empty since the last call.

    Accounting counts K blocks of each token.
    """
    counters = [
        counter.take()
        for layer in sparse_layers(model)
        for counter in (layer.trained, layer.evaluated)
    ]
    empty = sum(float(counter.sums[-1]) for counter in counters)
    if not empty:
        return 0.0
    assert shape.sffn is not None
    vectors = 3 if shape.gated else 2
    return empty * 2 * vectors * shape.hidden_size * shape.sffn.block_size / tokens


@pytest.mark.parametrize("heads", [None, 8])
def test_flops_of_recurrent_layers_are_those_of_megatrons_formula(heads: int | None) -> None:
    # Megatron takes twice the hidden size as the width of Mamba's heads: 8 heads of 6 numbers.
    mamba, width, pattern = dataclasses.replace(MAMBA, mamba_num_heads=heads), 24, "MMG*-/MG-"
    parser = add_megatron_arguments(ArgumentParser(allow_abbrev=False))
    args = parser.parse_args([])
    vars(args).update(
        **dataclasses.asdict(mamba),
        **dataclasses.asdict(DELTA_NET),
        hidden_size=width,
        hybrid_layer_pattern=pattern,
        mtp_num_layers=1,
        seq_length=18,
        num_attention_heads=4,
        kv_channels=10,
        ffn_hidden_size=40,
        padded_vocab_size=96,
    )
    without = Namespace(**{**vars(args), "hybrid_layer_pattern": "*-/-"})
    counted = num_floating_point_operations(args, 1) - num_floating_point_operations(without, 1)
    expected = 3 * mamba.flops(width) + 2 * DELTA_NET.flops(width)
    assert counted / (3 * args.seq_length) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "name", [name for name in MODELS if name not in (*LEARNED_DESCRIPTOR, *RECURRENT)]
)
def test_counted_forward_flops_are_those_of_the_built_model(name: str, one_rank: None) -> None:
    shape = dataclasses.replace(SMALL, **MODELS[name])
    # Without gradients: the counter's hooks trip over tensors that are sliced under no_grad.
    model = build(shape).eval().requires_grad_(False)
    arguments, kwargs = batch(shape)
    # A counter knows only the operators that exist when it is created.
    cpu.products(torch.float32, cells=1)
    with FlopCounterMode(display=False) as counter:
        model(*arguments, **kwargs)
    counts = {
        module: sum(flops.values()) / arguments[0].numel()
        for module, flops in counter.get_flop_counts().items()
    }

    def flops_of(suffix: str) -> float:
        return sum(flops for module, flops in counts.items() if module.endswith(suffix))

    expected = accounting.flops_per_token(shape)
    recomputed = recomputed_keys(shape)
    left_out = flops_of_empty_slots(model, shape, arguments[0].numel())
    assert flops_of(".self_attention") == expected.attention
    router = flops_of(".router") + flops_after_blocks(shape)
    assert router == expected.router + recomputed
    assert flops_of(".mlp") + flops_of(".eh_proj") - router == pytest.approx(
        expected.feed_forward - left_out, rel=1e-12
    )
    assert flops_of(".output_layer") == expected.logits
    assert counts["Global"] == pytest.approx(expected.total + recomputed - left_out, rel=1e-12)


def addmm_flops(total: Any, left: Any, right: Any, out_shape: Any = None, **scales: Any) -> int:
    """FLOPs of `addmm_`, which the counter does not know, from shapes."""
    return 2 * left[0] * left[1] * right[1]


class _NoModules:
    """Replaces the counter's tracker of modules, whose hooks fail on slices under no_grad."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


@contextmanager
def flop_counter() -> Iterator[FlopCounterMode]:
    """Count the FLOPs of the forward and backward pass, in-place products included."""
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_flops})
    counter.mod_tracker = _NoModules()
    with counter:
        yield counter


WITHOUT_GRADIENT = [name for name in SPARSE if not ROUTERS[name]().gated_output]
"""Routers whose selection has no backward pass by default; the papers count one."""


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("router", SPARSE)
def test_counted_training_flops_are_those_of_the_built_model(
    router: str, recompute: bool, one_rank: None
) -> None:
    shape = dataclasses.replace(SMALL, sparse_layers=2, sffn=sparse(router))
    full = {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    }
    model = build(shape, **(full if recompute else {}))
    arguments, kwargs = batch(shape)
    with flop_counter() as counter:
        model(*arguments, **kwargs, labels=arguments[0]).sum().backward()
    measured = counter.get_total_flops() / arguments[0].numel()
    forward, recomputed, noise = accounting.flops_per_token(shape), recomputed_keys(shape), 0
    if router == "noisy-top-k":
        noise = 2 * 2 * shape.hidden_size * shape.sffn.num_blocks
    convention = accounting.training_flops_per_token(shape, recompute=recompute)
    passes = 4 if recompute else 3
    exact = convention + passes * (recomputed + noise)
    if router in WITHOUT_GRADIENT:
        scores = forward.router + recomputed
        if router == "lorkm":
            # The projection has a gradient from the cells.
            scores -= 2 * 2 * shape.hidden_size * shape.sffn.router.rank
        exact -= 2 * scores
    # A recomputed pass is not counted by the layer, but computes as little.
    exact -= passes * flops_of_empty_slots(model, shape, arguments[0].numel())
    assert measured == pytest.approx(exact, rel=1e-12)
