"""Counted bytes of weights, gradients and optimizer state equal those of built models."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig
from megatron.training.models.hybrid import HybridModelBuilder, HybridModelConfig
from torch.utils.flop_counter import FlopCounterMode

from examples.verify.held_bytes import bytes_of_rank
from megatron_sffn.accounting import ModelShape, layer_parts, memory_per_rank
from megatron_sffn.accounting.activations import Activations
from megatron_sffn.accounting.held_parameters import held_parameters
from megatron_sffn.accounting.memory import RankMemory, memory_of_stage
from megatron_sffn.accounting.muon import Muon, held_numbers, muon_flops, muon_matrices
from megatron_sffn.accounting.pipeline_stages import microbatches_in_flight, pipeline_stages
from megatron_sffn.accounting.training_setup import TrainingSetup
from megatron_sffn.flags.megatron_flags import layout_of
from megatron_sffn.nn.hybrid_spec import hybrid_stack_spec
from megatron_sffn.nn.layer import sparse_layers
from megatron_sffn.nn.layer_pattern import cut, layer_pattern
from megatron_sffn.nn.layer_spec import block_spec
from megatron_sffn.nn.parallel_layout import ParallelLayout
from megatron_sffn.nn.routers.rand_hash import LARGEST_TABLE
from megatron_sffn.patches.registry import apply
from megatron_sffn.patches.run_hooks import PREDICTION_SPEC
from megatron_sffn.train.first_rank import parse_as_first_rank
from megatron_sffn.train.run import _with_sparse_predictions
from tests.accounting.models import (
    LATENT,
    SEVERAL_ROUTERS,
    SMALL,
    batch,
    build,
    config_of,
    hybrid_pattern_of,
    paper,
    sparse,
)
from tests.support.ranks import run_ranks
from tests.support.slow import slow

PARTS = ("*E", "*-", "*E", "*E")
"""The parts of the layers: with a dense layer among them, stages differ."""


def layout_with_sp(**sizes: Any) -> ParallelLayout:
    """A layout with sequence parallelism under TP."""
    return ParallelLayout(**sizes, sequence_parallel=sizes.get("tp", 1) > 1)


LAYOUTS = {
    "one rank": layout_with_sp(),
    "EP2": layout_with_sp(world_size=2, ep=2),
    "DP4 EP2": layout_with_sp(world_size=4, ep=2),
    "TP2 folded EP2": layout_with_sp(world_size=2, tp=2, ep=2),
    "PP2": layout_with_sp(world_size=2, pp=2),
    "PP2 VP2 EP2": layout_with_sp(world_size=4, pp=2, virtual_stages=2, ep=2),
    "TP2 PP2 ETP2": layout_with_sp(world_size=4, tp=2, pp=2, etp=2),
}
SPARSE_SMALL = dataclasses.replace(SMALL, bias=False, sparse_layers=3, sffn=sparse())
SHAPES: dict[str, ModelShape] = {
    "avg-k": SPARSE_SMALL,
    "switch": dataclasses.replace(
        SPARSE_SMALL, gated=True, layernorm=False, sffn=sparse("switch", shared_blocks=2)
    ),
    "lorkm": dataclasses.replace(
        SPARSE_SMALL, tied_embeddings=False, qk_layernorm=True, sffn=sparse("lorkm")
    ),
    "latent": dataclasses.replace(SPARSE_SMALL, sffn=sparse("switch", latent_size=10)),
    "memory-plus, one table": dataclasses.replace(
        SPARSE_SMALL, sffn=sparse("memory-plus", layers_per_table=3)
    ),
    "routers of layers": dataclasses.replace(SPARSE_SMALL, sffn=SEVERAL_ROUTERS),
    "latent attention": dataclasses.replace(
        SPARSE_SMALL, latent_attention=LATENT, qk_layernorm=True, softmax_type="learnable"
    ),
    "latent attention of queries without latents": dataclasses.replace(
        SPARSE_SMALL, latent_attention=dataclasses.replace(LATENT, q_lora_rank=None)
    ),
    "predicts 2": dataclasses.replace(
        SPARSE_SMALL, predicted_tokens=2, prediction="*E", tied_embeddings=False
    ),
    "repeats prediction": dataclasses.replace(
        SPARSE_SMALL,
        predicted_tokens=2,
        prediction="*E",
        repeats_prediction=True,
        tied_embeddings=False,
        latent_attention=LATENT,
    ),
    "hybrid": dataclasses.replace(
        SMALL, attention_layers=1, sparse_layers=2, sffn=sparse("switch"), bias=False
    ),
    "hybrid predicts 2": dataclasses.replace(
        SMALL,
        attention_layers=1,
        sparse_layers=2,
        sffn=sparse("switch"),
        predicted_tokens=2,
        prediction="E*-",
        tied_embeddings=False,
        latent_attention=LATENT,
        bias=False,
    ),
    "gated attention": dataclasses.replace(SPARSE_SMALL, output_gate=True),
}


def hybrid_pattern(shape: ModelShape, layout: ParallelLayout) -> str | None:
    """The pattern of a hybrid model, cut into the pipeline stages of a layout; None for a GPT."""
    pattern = hybrid_pattern_of(shape)
    return None if pattern is None else cut(pattern, layout.pp * layout.virtual_stages)


def parts_of(shape: ModelShape, layout: ParallelLayout) -> tuple[str, ...]:
    """The parts of the layers."""
    return layer_parts(shape, ["E" in layer for layer in PARTS], hybrid_pattern(shape, layout))


def builder_of(shape: ModelShape, layout: ParallelLayout) -> Any:
    """Megatron's builder of a GPT or a hybrid model."""
    pattern = hybrid_pattern(shape, layout)
    config = config_of(
        shape,
        layout.dtype,
        moe_layer_freq=layer_pattern("", 0, pattern) if pattern else ["E" in p for p in PARTS],
        **layout.megatron_sizes(),
        sequence_parallel=layout.sequence_parallel,
        batch_p2p_comm=False,
    )
    common: dict[str, Any] = {
        "transformer": config,
        "vocab_size": shape.padded_vocab_size,
        "seq_length": shape.seq_length,
        "position_embedding_type": "rope",
        "share_embeddings_and_output_weights": shape.tied_embeddings,
    }
    if pattern is not None:
        spec = hybrid_stack_spec(config)
        model = HybridModelConfig(hybrid_layer_pattern=pattern, hybrid_stack_spec=spec, **common)
        return HybridModelBuilder(model)
    apply(PREDICTION_SPEC, _with_sparse_predictions)
    return GPTModelBuilder(GPTModelConfig(transformer_layer_spec=block_spec, **common))


def measured_memory(
    shape: ModelShape, layout: ParallelLayout, distributed: bool, optimizer_name: str
) -> dict[str, Any]:
    """Parameters of this rank, and bytes of weights, gradients and optimizer state after a step."""
    warnings.simplefilter("ignore")
    chunks = builder_of(shape, layout).build_distributed_models(
        ProcessGroupCollection.use_mpu_process_groups(),
        ddp_config=DistributedDataParallelConfig(
            use_distributed_optimizer=distributed, grad_reduce_in_fp32=True
        ),
        data_parallel_random_init=False,
    )
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer=optimizer_name.split()[0],
            muon_tp_mode=optimizer_name.split()[-1],
            lr=1e-3,
            params_dtype=layout.dtype,
            bf16=layout.half_precision,
            use_distributed_optimizer=distributed,
        ),
        chunks,
    )
    weights = [parameter for chunk in chunks for parameter in chunk.parameters()]
    for parameter in weights:
        parameter.main_grad.fill_(1.0)
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    return {
        "flops": counter.get_total_flops(),
        "stage": parallel_state.get_pipeline_model_parallel_rank(),
        "parameters": sum(parameter.numel() for parameter in weights),
        **dataclasses.asdict(bytes_of_rank(chunks, optimizer, layout.half_precision)),
    }


def measured_memories(
    shapes: list[ModelShape], layout: ParallelLayout, distributed: bool, optimizer: str
) -> list[dict[str, Any]]:
    """Call `measured_memory` for several models in one world."""
    return [measured_memory(shape, layout, distributed, optimizer) for shape in shapes]


@pytest.mark.parametrize(
    ("half", "distributed", "optimizer"),
    [
        (False, False, "adam"),
        (True, True, "adam"),
        slow(False, True, "adam"),
        slow(True, False, "adam"),
        (True, False, "muon blockwise"),
        slow(True, False, "muon duplicated"),
        slow(True, False, "muon distributed"),
    ],
)
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_rank_holds_the_bytes_of_the_closed_form(
    name: str, half: bool, distributed: bool, optimizer: str
) -> None:
    dtype = torch.bfloat16 if half else torch.float32
    layout = dataclasses.replace(LAYOUTS[name], dtype=dtype)
    setup = TrainingSetup(
        gradient_bytes=4,
        distributed_optimizer=distributed,
        muon=Muon(tp_mode=optimizer.split()[1]) if optimizer.startswith("muon") else None,
    )
    shapes = [
        shape
        for shape in SHAPES.values()
        # Layers with one table are on one stage, and single cells cannot be split.
        if shape.sffn is None
        or (
            (layout.pp == 1 or shape.sffn.layers_per_table == 1)
            and shape.sffn.block_size % layout.etp == 0
        )
    ]
    ranks = run_ranks(
        layout.world_size,
        measured_memories,
        shapes,
        layout,
        distributed,
        optimizer,
        **layout.megatron_sizes(),
    )
    for index, shape in enumerate(shapes):
        stages = pipeline_stages(layout, parts_of(shape, layout))
        expected = [memory_of_stage(shape, stage, layout, setup) for stage in stages]
        for stage, memory in zip(stages, expected, strict=True):
            stage_ranks = [rank[index] for rank in ranks if rank[index]["stage"] == stage.index]
            assert len(stage_ranks) == layout.world_size // layout.pp
            flops = muon_flops(shape, stage, layout, setup.muon) if setup.muon else 0
            for rank in stage_ranks:
                assert rank["flops"] == flops
                assert rank["parameters"] == memory.parameters
                assert rank["weights"] == memory.weights
                assert rank["gradients"] == memory.gradients
            # The distributed optimizer shards buffers, not weights: only the mean over ranks is
            # exact.
            mean = sum(rank["optimizer"] for rank in stage_ranks) / len(stage_ranks)
            assert mean == pytest.approx(memory.optimizer, abs=1)
            if setup.muon:
                matrices = muon_matrices(shape, stage, layout, setup.muon)
                held = held_parameters(shape, stage, layout)
                assert held_numbers(matrices, layout) == held.matrices
            if not distributed:
                assert {rank["optimizer"] for rank in stage_ranks} == {memory.optimizer}


def memory_of_stages(shape: ModelShape, layout: ParallelLayout, **setup: Any) -> list[RankMemory]:
    """Memory of each stage."""
    training = TrainingSetup(**setup)
    return [
        memory_of_stage(shape, stage, layout, training) for stage in pipeline_stages(layout, PARTS)
    ]


def test_stages_have_the_layers_that_megatron_gives_them() -> None:
    layers = tuple("*-" if i % 3 else "*E" for i in range(8))
    layout = ParallelLayout(world_size=2, pp=2, virtual_stages=2)
    first, last = pipeline_stages(layout, layers)
    assert first.chunks == (layers[0:2], layers[4:6]) and (first.first, first.last) == (True, False)
    assert last.chunks == (layers[2:4], layers[6:8]) and (last.first, last.last) == (False, True)
    uneven = ParallelLayout(world_size=3, pp=3, first_stage_layers=1, last_stage_layers=3)
    assert [stage.layers for stage in pipeline_stages(uneven, layers)] == [
        layers[:1],
        layers[1:5],
        layers[5:],
    ]


def test_early_stages_and_interleaved_chunks_have_more_microbatches_in_flight() -> None:
    layout = ParallelLayout(world_size=4, pp=4)
    stages = pipeline_stages(layout, ("*-",) * 8)
    assert [microbatches_in_flight(layout, stage, 16) for stage in stages] == [4, 3, 2, 1]
    assert [microbatches_in_flight(layout, stage, 2) for stage in stages] == [2, 2, 2, 1]
    # Interleaved: 2 · 3 warm-up microbatches, 4 for the second chunk, and one that runs; a chunk is
    # half a stage.
    layout = ParallelLayout(world_size=4, pp=4, virtual_stages=2)
    stages = pipeline_stages(layout, ("*-",) * 8)
    assert [microbatches_in_flight(layout, stage, 16) for stage in stages] == [
        11 / 2,
        9 / 2,
        7 / 2,
        5 / 2,
    ]


def test_recomputation_keeps_inputs_and_one_layer() -> None:
    shape, layout = SHAPES["avg-k"], ParallelLayout()
    sizes = Activations(shape, layout, TrainingSetup())
    (plain,) = memory_of_stages(shape, layout)
    layers = 3 * sizes.layer("*E") + sizes.layer("*-")
    ends = sizes.embedding() + sizes.head()
    assert plain.activations == ends + layers
    largest = max(sizes.layer("*E"), sizes.layer("*-"))
    (full,) = memory_of_stages(shape, layout, recompute="full")
    assert full.activations == sizes.embedding() + 4 * sizes.hidden_states() + max(
        largest, sizes.head()
    )
    (two_layers,) = memory_of_stages(
        shape, layout, recompute="full", recompute_method="block", recompute_layers=2
    )
    assert (
        two_layers.activations
        == sizes.embedding()
        + 2 * sizes.hidden_states()
        + 2 * sizes.layer("*E")
        + max(largest, sizes.head())
    )
    (without_scores,) = memory_of_stages(
        shape, layout, recompute="selective", recompute_modules=("core_attn",)
    )
    assert without_scores.activations == layers - 4 * sizes.attention_scores() + ends
    assert (
        without_scores.attention_scores == 0
        and plain.attention_scores == 4 * sizes.attention_scores()
    )
    (without_blocks,) = memory_of_stages(
        shape, layout, recompute="selective", recompute_modules=("moe",)
    )
    assert plain.activations - without_blocks.activations == pytest.approx(
        3
        * (
            sizes.layer("*E")
            - sizes.attention()
            - sizes.attention_scores()
            - sizes.mlp_norm_and_dropout()
        )
        - 3 * sizes.hidden_states()
    )


def test_the_fullest_rank_is_on_the_largest_stage() -> None:
    shape, layout = SHAPES["lorkm"], ParallelLayout(world_size=2, pp=2)
    first, last = memory_of_stages(shape, layout, num_microbatches=8)
    assert first.in_flight == 2 and last.in_flight == 1
    fullest = memory_per_rank(shape, PARTS, layout, TrainingSetup(num_microbatches=8))
    assert fullest == max(first, last, key=lambda rank: rank.total)


def test_blocks_and_optimizer_are_sharded_over_thousands_of_ranks() -> None:
    shape = paper(block_size=64)
    parts = layer_parts(shape, [int((i + 1) % 6 == 0) for i in range(24)])
    setup = TrainingSetup(distributed_optimizer=True, rope_width=64)
    layout = ParallelLayout(world_size=4096, ep=1024, dtype=torch.bfloat16)
    one_rank = memory_per_rank(shape, parts, ParallelLayout(dtype=torch.bfloat16), setup)
    sharded = memory_per_rank(shape, parts, layout, setup)
    # One block of 64 cells per layer instead of 1,024 blocks.
    assert one_rank.parameters - sharded.parameters == 4 * 1023 * 64 * 2 * 1024
    cells, other_parameters = 4 * 64 * 2 * 1024, sharded.parameters - 4 * 64 * 2 * 1024
    assert sharded.optimizer == round(12 * (cells / 4 + other_parameters / 4096))


@pytest.mark.filterwarnings("ignore:'type' is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*tp_group is None:DeprecationWarning:megatron")
@pytest.mark.parametrize(
    ("router", "options", "balance", "numbers"),
    [
        ("rand-hash", {}, {}, 0),
        ("rand-hash", {"balance": "frequency"}, {}, 0),
        ("avg-k", {"descriptor": "ema"}, {}, 0),
        ("avg-k", {}, {"moe_router_enable_expert_bias": True}, 2),
        ("switch", {}, {"moe_router_load_balancing_type": "quantile_balancing"}, 2),
        (
            "switch",
            {},
            {"moe_router_load_balancing_type": "global_aux_loss", "moe_aux_loss_coeff": 0.1},
            1,
        ),
    ],
)
def test_sparse_layers_hold_the_tables_of_the_closed_form(
    router: str, options: dict[str, Any], balance: dict[str, Any], numbers: int, one_rank: None
) -> None:
    shape = dataclasses.replace(SMALL, sparse_layers=4, sffn=sparse(router, options))
    model = build(shape, padded_vocab_size=shape.padded_vocab_size, **balance)
    arguments, kwargs = batch(shape)
    model(*arguments, **kwargs)
    layers = list(sparse_layers(model))
    tables = [getattr(layer.router, "_table", None) for layer in layers]
    buffers = [buffer for layer in layers for buffer in layer.buffers()]
    held = [table for table in (*tables, *buffers) if table is not None]
    size = sum(table.nbytes for table in held if table.numel() > 1)  # single numbers do not count
    (stage,) = pipeline_stages(ParallelLayout(), ("*E",) * 4)
    setup = TrainingSetup(balance_numbers=numbers)
    memory = memory_of_stage(shape, stage, ParallelLayout(), setup)
    assert size == memory.router_tables
    assert memory.state == size + memory.weights + memory.gradients + memory.optimizer


@pytest.mark.filterwarnings("ignore:'type' is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    ("flags", "numbers"),
    [
        ("--moe-router-enable-expert-bias", 2),
        ("--moe-router-load-balancing-type quantile_balancing", 2),
        ("--moe-router-load-balancing-type global_aux_loss --moe-aux-loss-coeff 0.1", 1),
        ("--moe-aux-loss-coeff 0.1", 0),
    ],
)
def test_flags_of_load_balancing_say_what_it_holds(flags: str, numbers: int) -> None:
    model = "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --sffn-router switch"
    sizes = "--seq-length 32 --max-position-embeddings 32 --vocab-size 96 --micro-batch-size 1"
    args, _ = parse_as_first_rank(f"{model} {sizes} {flags}".split(), 1, device="cpu")
    setup = TrainingSetup.of_args(args, layout_of(args), activation="gelu")
    assert setup.balance_numbers == numbers


def test_a_hash_table_that_is_too_large_is_not_built() -> None:
    layer = sparse("rand-hash")
    table_bytes = layer.router.held_bytes(layer, 24, LARGEST_TABLE // (2 * layer.num_active_blocks))
    assert 0.99 * LARGEST_TABLE < table_bytes <= LARGEST_TABLE
    assert layer.router.held_bytes(layer, 24, LARGEST_TABLE) == 0
    assert layer.router.held_bytes(layer, 24, None) == 0
