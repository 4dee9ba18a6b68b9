"""Bytes of activations in closed form equal the bytes that torch keeps."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.activations import quick_gelu, squared_relu

from megatron_sffn.accounting import ModelShape, layer_parts
from megatron_sffn.accounting.activations import Activations
from megatron_sffn.accounting.sparse import backend_of, rows_and_pairs, saved_by_sparse_layer
from megatron_sffn.accounting.training_setup import TrainingSetup
from megatron_sffn.nn.config import Backend, SparseFFNConfig
from megatron_sffn.nn.layer import sparse_layers
from megatron_sffn.nn.parallel_layout import ParallelLayout
from megatron_sffn.nn.routers import ROUTERS
from megatron_sffn.nn.routers.base import Routing
from megatron_sffn.nn.saved_bytes import LayerCall
from tests.accounting.models import (
    DENSE,
    LATENT,
    SEVERAL_ROUTERS,
    SINGLE_KEY,
    SMALL,
    SPARSE,
    batch,
    build,
    hybrid_pattern_of,
    pattern_of,
    sparse,
)
from tests.accounting.saved import kept_bytes
from tests.support.cuda_operators import CUDA_OPERATORS
from tests.support.ranks import run_ranks
from tests.support.slow import slow
from tests.support.waits import simulated_gpu

# Megatron gives these warnings about its own calls.
pytestmark = [
    pytest.mark.filterwarnings("ignore:MLP requires ffn_hidden_size:DeprecationWarning:megatron"),
    pytest.mark.filterwarnings("ignore:.*tp_group is None:DeprecationWarning:megatron"),
    pytest.mark.filterwarnings("ignore:'type' is deprecated:DeprecationWarning"),
]

SAMPLES = 3
ACTIVATIONS: dict[str, tuple[Any, bool]] = {
    "gelu": (F.gelu, False),
    "relu": (F.relu, False),
    "squared_relu": (squared_relu, False),
    "swiglu": (F.silu, True),
    "quick_geglu": (quick_gelu, True),
}
MODELS: dict[str, dict[str, Any]] = {
    **DENSE,
    "learned-positions": {"learned_positions": 20},
    "quick-geglu": {"gated": True},
    "predicts-2": {"predicted_tokens": 2, "prediction": "*-"},
    "repeats-prediction": {
        "predicted_tokens": 2,
        "prediction": "*-",
        "repeats_prediction": True,
        "layernorm": False,
        "learned_positions": 20,
    },
}
"""Name of a dense model -> what it has other than `SMALL`."""


HYBRID: dict[str, dict[str, Any]] = {
    "dense": {"num_layers": 5, "attention_layers": 2},
    "swiglu-shared": {
        "num_layers": 5,
        "attention_layers": 2,
        "sparse_layers": 2,
        "sffn": sparse("switch", shared_blocks=2),
        "gated": True,
        "layernorm": False,
        "latent_attention": LATENT,
    },
    "predicts-2": {
        "num_layers": 4,
        "attention_layers": 1,
        "sparse_layers": 2,
        "sffn": sparse("switch"),
        "predicted_tokens": 2,
        "prediction": "E*-",
    },
}
"""Name of a hybrid model -> what it has other than `SMALL`."""


def of_sparse_layers(layer: SparseFFNConfig, **changes: Any) -> ModelShape:
    """A model of two sparse layers."""
    return dataclasses.replace(SMALL, num_layers=2, sparse_layers=2, sffn=layer, **changes)


def measured(
    shape: ModelShape,
    activation: str,
    half: bool,
    **megatron: Any,
) -> int:
    """Bytes that a model of this shape keeps of one microbatch, on this rank.

    It includes `bytes_of_empty_slots` of the routers that leave slots empty.
    """
    dtype = torch.bfloat16 if half else torch.float32
    megatron = {"activation_func": ACTIVATIONS[activation][0]} | megatron
    model = build(shape, dtype, **megatron)
    arguments, kwargs = batch(shape, SAMPLES)
    if shape.predicted_tokens:
        kwargs["loss_mask"] = torch.ones_like(arguments[0], dtype=torch.float32)
    masks = shape.seq_length**2  # the attention mask is an input
    routings: list[Routing] = []
    for layer in sparse_layers(model):
        layer.trained.register_forward_pre_hook(lambda _, args: routings.append(args[0]))
    size = kept_bytes(lambda: model(*arguments, **kwargs, labels=arguments[0]), model.parameters())
    return size - masks + sum(bytes_of_empty_slots(shape, half, routing) for routing in routings)


def bytes_of_empty_slots(shape: ModelShape, half: bool, routing: Routing) -> int:
    """What the pairs of empty slots would take; the closed form counts K blocks of each token."""
    assert shape.sffn is not None
    if not routing.may_be_empty:
        return 0
    empty = int((routing.block_ids < 0).sum())
    # The indices of the slots that are not empty are kept if any slot is.
    indices = 8 * (empty or routing.block_ids.numel())
    # A pair has a row, up projections, and a gate with its index.
    per_pair = 4 + shape.sffn.block_size * (2 if half else 4) * (2 if shape.gated else 1) + 8
    return indices + empty * per_pair


def closed_form(
    shape: ModelShape, activation: str, half: bool, layout: ParallelLayout, **setup: Any
) -> float:
    """The bytes of `measured` in closed form."""
    setup = {"softmax_in_fp32": True, "rope_width": rope_width(shape)} | setup
    sizes = Activations(
        shape,
        dataclasses.replace(layout, dtype=torch.bfloat16 if half else torch.float32),
        TrainingSetup(micro_batch_size=SAMPLES, activation=activation, **setup),
    )
    parts = layer_parts(shape, pattern_of(shape), hybrid_pattern_of(shape))
    prediction = sizes.prediction_input() + sizes.prediction_projection()
    prediction += sum(map(sizes.layer, shape.prediction_layers))
    layers = sum(map(sizes.layer, parts)) + shape.predicted_tokens * prediction
    return sizes.embedding() + layers + sizes.head()


def rope_width(shape: ModelShape) -> int:
    """Numbers of a head that RoPE rotates in a model of this shape."""
    if shape.latent_attention is not None:
        return shape.latent_attention.qk_pos_emb_head_dim
    return 0 if shape.learned_positions else shape.kv_channels


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("name", MODELS)
def test_dense_models_keep_the_bytes_of_the_closed_form(
    name: str, dropout: float, half: bool, one_rank: None
) -> None:
    shape = dataclasses.replace(SMALL, **MODELS[name])
    gated = "quick_geglu" if name == "quick-geglu" else "swiglu"
    activation = gated if shape.gated else "gelu"
    size = measured(shape, activation, half, hidden_dropout=dropout, attention_dropout=dropout)
    rotated = rope_width(shape)
    assert size == closed_form(
        shape,
        activation,
        half,
        ParallelLayout(),
        hidden_dropout=dropout > 0,
        attention_dropout=dropout > 0,
        rope_width=rotated,
    )


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("name", HYBRID)
def test_hybrid_models_keep_the_bytes_of_the_closed_form(
    name: str, half: bool, one_rank: None
) -> None:
    shape = dataclasses.replace(SMALL, **HYBRID[name])
    activation = "swiglu" if shape.gated else "gelu"
    size = measured(shape, activation, half)
    assert size == closed_form(shape, activation, half, ParallelLayout())


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(
    ("router", "activation"),
    [
        (router, activation)
        for router in SPARSE
        for activation, (_, gated) in ACTIVATIONS.items()
        if not (gated and router in SINGLE_KEY)
    ],
)
def test_routers_keep_the_bytes_of_the_closed_form(
    router: str, half: bool, activation: str, one_rank: None
) -> None:
    gated = ACTIVATIONS[activation][1]
    shape = of_sparse_layers(sparse(router), gated=gated)
    size = measured(shape, activation, half)
    assert size == closed_form(shape, activation, half, ParallelLayout())


@pytest.mark.parametrize("half", [False, True])
def test_layers_of_several_routers_keep_the_bytes_of_the_closed_form(
    half: bool, one_rank: None
) -> None:
    shape = dataclasses.replace(SMALL, num_layers=3, sparse_layers=3, sffn=SEVERAL_ROUTERS)
    size = measured(shape, "gelu", half)
    assert size == closed_form(shape, "gelu", half, ParallelLayout())


OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("avg-k", {"gate": "sqrt-softplus"}),
    ("avg-k", {"gate": "sqrt-softplus-chosen"}),
    ("sigma-moe", {"gate": "sigmoid-chosen"}),
    ("avg-k", {"gate": "sigmoid"}),
    ("avg-k", {"gate": "softmax", "entropy_coefficient": 0.1}),
    *(
        ("avg-k", {"gate": "sigmoid", "descriptor": descriptor})
        for descriptor in ("max-norm", "norm-weighted", "learned", "subset", "ema")
    ),
    *(
        (router, {"gate": "sigmoid", "aggregator": aggregator})
        for router in ("vanilla-m", "lorkm")
        for aggregator in ("mean", "mean-abs", "max", "min", "norm")
    ),
    ("top-k-act", {"gate": "softmax"}),
    ("sigma-moe", {"gate": "none", "entropy_coefficient": 0.1}),
    ("switch", {"network": "mlp", "network_width": 11}),
    ("switch", {"network": "mlp", "network_width": 11, "network_activation": "gelu"}),
    ("noisy-top-k", {"network": "attention", "network_width": 11}),
    ("pkm", {"heads": 8}),
    ("avg-k", {"gate": "relu"}),
    ("peer", {"gate": "relu"}),
    ("peer", {"key_norm": True}),
    ("memory-plus", {"key_norm": True}),
    ("remoe", {"l1_coefficient": 0.1}),
    ("remoe", {"l1_coefficient": 0.1, "entropy_coefficient": 0.1}),
    *(("peer", {"gate": gate}) for gate in ("sigmoid", "sqrt-softplus-chosen", "sigmoid-chosen")),
]


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(("router", "options"), OPTIONS)
def test_ablations_of_routers_keep_the_bytes_of_the_closed_form(
    router: str, options: dict[str, Any], half: bool, one_rank: None
) -> None:
    shape = of_sparse_layers(sparse(router, options))
    size = measured(shape, "gelu", half)
    # A moving average keeps a bool per block until the averages of all blocks have started.
    started_flags = 2 * 24 if options.get("descriptor") == "ema" else 0
    assert size - started_flags == closed_form(shape, "gelu", half, ParallelLayout())


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("clamp", [None, 0.1])
@pytest.mark.parametrize("router", ["switch", "vanilla-m"])
def test_clamped_activations_keep_the_bytes_of_the_closed_form(
    router: str, clamp: float | None, half: bool, one_rank: None
) -> None:
    layer = dataclasses.replace(sparse(router), shared_blocks=1)
    shape = of_sparse_layers(layer, gated=True)
    fields = {"activation_func_clamp_value": clamp, "glu_linear_offset": 1.0}
    size = measured(shape, "quick_geglu", half, **fields)
    setup = {"clamp": clamp is not None, "offset": True}
    assert size == closed_form(shape, "quick_geglu", half, ParallelLayout(), **setup)


def test_norms_of_relu_coefficients_keep_the_bytes_of_the_closed_form(one_rank: None) -> None:
    shape = of_sparse_layers(sparse("vanilla-m", {"aggregator": "norm", "gate": "softmax"}))
    size = measured(shape, "relu", False)
    assert size == closed_form(shape, "relu", False, ParallelLayout())


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("gate", ["softmax-chosen", "sigmoid", "sqrt-softplus-chosen"])
def test_heads_that_choose_one_block_keep_the_bytes_of_its_one_pair(
    gate: str, half: bool, one_rank: None
) -> None:
    shape = of_sparse_layers(sparse("peer", {"heads": 4, "gate": gate}))
    size = measured(shape, "gelu", half)
    assert size == closed_form(shape, "gelu", half, ParallelLayout())


@pytest.mark.parametrize("block_size", [1, 2, 48])
@pytest.mark.parametrize(
    ("router", "losses"),
    [
        ("rand-hash", ()),
        *(
            (router, losses)
            for router in ("avg-k", "switch")
            for losses in ((), ("aux_loss",), ("aux_loss", "z_loss"))
        ),
    ],
)
def test_block_sizes_shared_blocks_and_losses_keep_the_bytes_of_the_closed_form(
    router: str, losses: tuple[str, ...], block_size: int, one_rank: None
) -> None:
    layer = sparse(router, block_size=block_size, shared_blocks=5 if block_size < 48 else 0)
    shape = of_sparse_layers(layer)
    balance: dict[str, Any] = {}
    if "aux_loss" in losses:
        balance = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.01}
    if "z_loss" in losses:
        balance["moe_z_loss_coeff"] = 0.01
    size = measured(shape, "gelu", False, **balance)
    assert size == closed_form(shape, "gelu", False, ParallelLayout(), losses=frozenset(losses))


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(
    ("router", "options", "shared"),
    [
        ("avg-k", {}, 0),
        ("avg-k", {"gate": "sigmoid"}, 0),
        ("vanilla-m", {"gate": "sigmoid"}, 0),
        ("lorkm", {}, 0),
        ("switch", {}, 0),
        ("switch", {}, 5),
        ("rand-hash", {}, 0),
    ],
)
def test_latent_layers_keep_the_bytes_of_the_closed_form(
    router: str, options: dict[str, Any], shared: int, half: bool, one_rank: None
) -> None:
    layer = sparse(router, options, latent_size=10, block_size=2, shared_blocks=shared)
    shape = of_sparse_layers(layer)
    assert measured(shape, "gelu", half) == closed_form(shape, "gelu", half, ParallelLayout())


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(
    ("backend", "router"),
    [
        *((backend, router) for backend in ("masked", "bags") for router in ("switch", "pkm")),
        ("grouped", "avg-k"),
        ("grouped", "switch"),
    ],
)
def test_backends_keep_the_indices_that_they_derive_from_pairs(
    backend: str, router: str, half: bool, one_rank: None
) -> None:
    sizes = {} if router == "pkm" else {"block_size": 8}
    layer = sparse(router, backend=Backend(backend), **sizes)
    shape = of_sparse_layers(layer)
    size = measured(shape, "gelu", half)
    assert size == closed_form(shape, "gelu", half, ParallelLayout())
    # The C++ kernels derive nothing.
    cpp_shape = dataclasses.replace(shape, sffn=dataclasses.replace(layer, backend=Backend.CPU))
    pairs = SAMPLES * shape.seq_length * layer.num_active_blocks
    derived = size - closed_form(cpp_shape, "gelu", half, ParallelLayout())
    assert derived >= 4 * shape.sparse_layers * pairs


GPU_SCORES: list[tuple[str, dict[str, Any]]] = [
    ("avg-k", {"gate": "sigmoid"}),
    ("vanilla-m", {"gate": "sigmoid"}),
    ("lorkm", {"gate": "sigmoid"}),
    ("switch", {}),
    ("switch", {"network": "mlp", "network_width": 11, "network_activation": "gelu"}),
]


@pytest.mark.parametrize(("router", "options"), GPU_SCORES)
def test_scores_of_a_gpu_keep_half_precision_operands(
    router: str, options: dict[str, Any], one_rank: None
) -> None:
    assert CUDA_OPERATORS is not None
    layer = sparse(router, options, backend=Backend.MASKED)
    shape = of_sparse_layers(layer)
    on_cpu = measured(shape, "gelu", True)
    with simulated_gpu():
        on_gpu = measured(shape, "gelu", True)
    host, gpu = (
        saved_by_sparse_layer(
            LayerCall(
                sffn=layer,
                hidden_size=shape.hidden_size,
                tokens=SAMPLES * shape.seq_length,
                layout=ParallelLayout(dtype=torch.bfloat16),
                activation="gelu",
                losses=frozenset(),
                cuda=cuda,
            )
        )
        for cuda in (False, True)
    )
    # Megatron's own modules do not see the simulated GPU.
    assert on_cpu - on_gpu == shape.sparse_layers * (host - gpu)
    assert (host > gpu) == (router != "switch")


def test_fewer_rows_arrive_under_group_limited_routing() -> None:
    call = LayerCall(
        sffn=sparse(active_cells=96, block_size=1, expansion=2, regather="off"),
        hidden_size=24,
        tokens=100,
        layout=ParallelLayout(ep=16),
        activation="gelu",
        losses=frozenset(),
    )
    limited = dataclasses.replace(
        call, layout=dataclasses.replace(call.layout, router_groups=16, router_group_topk=12)
    )
    free_rows, pairs = rows_and_pairs(call)
    rows, same_pairs = rows_and_pairs(limited)
    assert rows == pytest.approx(1200, rel=1e-3) and free_rows > 1590 and pairs == same_pairs
    limited_bytes, free_bytes = (
        saved_by_sparse_layer(layer_call) for layer_call in (limited, call)
    )
    # A row of 24 numbers, and the token behind it.
    assert free_bytes - limited_bytes == pytest.approx((free_rows - rows) * (24 * 4 + 4))


def test_auto_on_a_gpu_is_the_backend_with_the_least_estimate() -> None:
    sizes = {
        # block size, expansion, bf16
        "grouped": (512, 16, True),
        "masked": (8, 4, False),
    }
    for expected, (block_size, expansion, half) in sizes.items():
        layer = SparseFFNConfig(
            router=ROUTERS["avg-k"](), active_cells=4096, block_size=block_size, expansion=expansion
        )
        call = LayerCall(
            sffn=layer,
            hidden_size=1024,
            tokens=4096,
            layout=ParallelLayout(dtype=torch.bfloat16 if half else torch.float32),
            activation="gelu",
            losses=frozenset(),
            cuda=True,
        )
        assert backend_of(call) == expected
        assert backend_of(dataclasses.replace(call, cuda=False)) == "auto"


LAYOUTS = {
    "EP2": ParallelLayout(world_size=2, ep=2),
    "EP2 allgather": ParallelLayout(world_size=2, ep=2, dispatcher="allgather"),
    "ETP2": ParallelLayout(world_size=2, etp=2),
    "TP2 folded EP2": ParallelLayout(world_size=2, tp=2, ep=2, sequence_parallel=True),
    "EP2 ETP2": ParallelLayout(world_size=4, ep=2, etp=2),
}
EXCHANGED = [
    sparse("avg-k", shared_blocks=2),
    sparse("avg-k", {"gate": "sigmoid"}),
    sparse("vanilla-m", {"gate": "sigmoid"}),
    sparse("lorkm"),
    sparse("lorkm", {"gate": "sigmoid"}),
    sparse("switch"),
    sparse("switch", regather="on"),
    sparse("switch", exchange_chunks=3),
    sparse("rand-hash", regather="on"),
    sparse("lorkm", regather="on"),
    sparse("top-k-act"),
    sparse("pkm"),
    sparse("pkm-ffn"),
]


def measured_on_rank(shapes: list[ModelShape], layout: ParallelLayout, half: bool) -> list[int]:
    """Bytes that each of the models keeps on this rank."""
    warnings.simplefilter("ignore")
    torch.manual_seed(torch.distributed.get_rank())
    return [
        measured(
            shape,
            "gelu",
            half,
            **layout.megatron_sizes(),
            sequence_parallel=layout.sequence_parallel,
            moe_token_dispatcher_type=layout.dispatcher,
        )
        for shape in shapes
    ]


# One rank keeps the bytes of both dtypes; a layout divides them in the same way.
@pytest.mark.parametrize(
    ("name", "half"),
    [
        *((name, True) for name in LAYOUTS),
        ("TP2 folded EP2", False),
        *(slow(name, False) for name in LAYOUTS if name != "TP2 folded EP2"),
    ],
)
def test_every_layout_keeps_the_bytes_of_the_closed_form(name: str, half: bool) -> None:
    layout = LAYOUTS[name]
    layers = [
        layer
        for layer in EXCHANGED
        if layer.block_size % layout.etp == 0
        and (layer.exchange_chunks == 1 or layout.dispatcher == "alltoall")
    ]
    # Megatron has no biases under ETP.
    shapes = [of_sparse_layers(layer, bias=False) for layer in layers]
    if layout.tp > 1:
        predicts = {"predicted_tokens": 2, "prediction": "*E", "tied_embeddings": False}
        shapes += [
            dataclasses.replace(shapes[0], **predicts),
            dataclasses.replace(shapes[0], num_layers=3, attention_layers=1, **predicts),
        ]
        without_query_latents = dataclasses.replace(LATENT, q_lora_rank=None)
        shapes += [
            dataclasses.replace(shapes[0], latent_attention=latent, **norms)
            for latent, norms in (
                (LATENT, {}),
                (LATENT, {"qk_layernorm": True}),
                (LATENT, {"qk_layernorm": True, "layernorm": False}),
                (without_query_latents, {}),
            )
        ]
    ranks = run_ranks(
        layout.world_size,
        measured_on_rank,
        shapes,
        layout,
        half,
        **layout.megatron_sizes(),
    )
    for index, shape in enumerate(shapes):
        size = sum(rank[index] for rank in ranks) / layout.world_size
        # Routing is not quite uniform: some tokens miss a rank.
        assert closed_form(shape, "gelu", half, layout) == pytest.approx(size, rel=2e-3), shape.sffn


FULL = {"recompute_granularity": "full", "recompute_num_layers": 1}
PREDICTS = {"predicted_tokens": 2, "prediction": "*E"}
RECOMPUTED: list[tuple[dict[str, Any], Any]] = [
    ({**FULL, "recompute_method": "uniform"}, lambda sizes: 4 * sizes.hidden_states()),
    (
        {**FULL, "recompute_method": "block"},
        lambda sizes: sizes.hidden_states() + 2 * sizes.layer("*E") + sizes.layer("*-"),
    ),
    (
        {**FULL, "recompute_method": "uniform", **PREDICTS},
        lambda sizes: 8 * sizes.hidden_states() + 2 * sizes.prediction_input(),
    ),
    (
        {**FULL, "recompute_method": "block", **PREDICTS},
        lambda sizes: (
            sizes.hidden_states()
            + 4 * sizes.layer("*E")
            + sizes.layer("*-")
            + 2 * (sizes.prediction_input() + sizes.prediction_projection())
        ),
    ),
    (
        {**FULL, "recompute_method": "uniform", **PREDICTS, "attention_layers": 1},
        lambda sizes: 8 * sizes.hidden_states() + 2 * sizes.prediction_input(),
    ),
    (
        {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
        lambda sizes: (
            2 * sizes.layer("*-")
            + 2
            * (
                sizes.attention()
                + sizes.attention_scores()
                + sizes.mlp_norm_and_dropout()
                + sizes.hidden_states()
            )
        ),
    ),
    (
        {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
        lambda sizes: (
            2 * sizes.layer("*E")
            + 2
            * (
                sizes.attention()
                + sizes.attention_scores()
                + sizes.mlp_norm_and_dropout()
                + sizes.hidden_states()
            )
        ),
    ),
    (
        {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
        lambda sizes: 2 * sizes.layer("*-") + 2 * sizes.layer("*E") - 4 * sizes.attention_scores(),
    ),
]


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("norms", [{}, {"qk_layernorm": True, "layernorm": False}])
def test_recomputed_up_projections_are_not_kept(
    norms: dict[str, Any], half: bool, one_rank: None
) -> None:
    modules = ["mla_up_proj"]
    shape = dataclasses.replace(SMALL, latent_attention=LATENT, **norms)
    flags = {"recompute_granularity": "selective", "recompute_modules": modules}
    size = measured(shape, "gelu", half, **flags)
    setup = {"recompute": "selective", "recompute_modules": tuple(modules)}
    assert size == closed_form(shape, "gelu", half, ParallelLayout(), **setup)


# Megatron warns about fused attention, which is not installed.
@pytest.mark.filterwarnings("ignore:If you are using transformer_engine:UserWarning:megatron")
@pytest.mark.filterwarnings("ignore:recompute_method == 'block' is not supported for MTP")
@pytest.mark.parametrize(("flags", "layers"), RECOMPUTED)
def test_recomputation_keeps_the_bytes_of_the_closed_form(
    flags: dict[str, Any], layers: Any, one_rank: None
) -> None:
    # Layers 1 and 3, from 0, are sparse.
    sizes_of_model = {name: value for name, value in flags.items() if hasattr(SMALL, name)}
    shape = dataclasses.replace(SMALL, sparse_layers=2, sffn=sparse("switch"), **sizes_of_model)
    recompute = {name: value for name, value in flags.items() if name not in sizes_of_model}
    size = measured(shape, "gelu", False, **recompute)
    sizes = Activations(
        shape,
        ParallelLayout(),
        TrainingSetup(micro_batch_size=SAMPLES, rope_width=shape.kv_channels),
    )
    assert layers(sizes) + sizes.embedding() + sizes.head() == pytest.approx(size, rel=0.02)
