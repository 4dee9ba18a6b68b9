"""Counts against the papers' table, against modules that are really built, and by enumeration."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.training.arguments import parse_args, validate_args
from megatron.training.models.gpt import GPTModelConfig
from torch.utils.flop_counter import FlopCounterMode

from megatron_sffn import accounting
from megatron_sffn.accounting import ModelShape
from megatron_sffn.config import Backend, Exchange, SparseFFNConfig, SparseFFNTransformerConfig
from megatron_sffn.model import block_spec, layer_pattern
from megatron_sffn.routers import ROUTERS

# Megatron's own, of calls within Megatron.
pytestmark = [
    pytest.mark.filterwarnings("ignore:MLP requires ffn_hidden_size:DeprecationWarning:megatron"),
    pytest.mark.filterwarnings("ignore:.*tp_group is None:DeprecationWarning:megatron"),
    pytest.mark.filterwarnings("ignore:'type' is deprecated:DeprecationWarning"),
]


def sparse(router: str = "avg-k", **numbers: Any) -> SparseFFNConfig:
    return SparseFFNConfig(router=ROUTERS[router](), **numbers)


def paper(router: str = "avg-k", block_size: int = 4096, expansion: int = 16) -> ModelShape:
    """The 355 M models of arXiv 2305.13999: every sixth of 24 layers is sparse."""
    return ModelShape(
        num_layers=24,
        hidden_size=1024,
        ffn_hidden_size=4096,
        num_attention_heads=16,
        kv_channels=64,
        seq_length=2048,
        padded_vocab_size=50257,
        sparse_layers=4,
        sffn=sparse(router, active_cells=4096, block_size=block_size, expansion=expansion),
    )


def training(shape: ModelShape) -> float:
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
def test_papers_table(router: str, block_size: int, gate: int, total: str, percent: str) -> None:
    shape = paper(router, block_size)
    over = 100 * (training(shape) / training(accounting.dense_equivalent(shape)) - 1)
    assert accounting.flops_per_token(shape).router == 4 * gate
    assert f"{training(shape):.4f}" == total
    assert f"{over:.{len(percent.partition('.')[2])}f}" == percent


@pytest.mark.parametrize(("expansion", "total"), [(16, "0.3326"), (4, "0.2360")])
@pytest.mark.parametrize("block_size", [1, 256])
def test_papers_vanilla_m(block_size: int, expansion: int, total: str) -> None:
    assert f"{training(paper('vanilla-m', block_size, expansion)):.4f}" == total


def test_dense_is_narayanans_formula() -> None:
    dense, h, s, v = accounting.dense_equivalent(paper()), 1024, 2048, 50257
    formula = 96 * 24 * h**2 * (1 + s / (6 * h) + v / (16 * 24 * h))
    assert accounting.training_flops_per_token(dense, recompute=True) == pytest.approx(formula)
    assert accounting.flops_per_token(dense).total == 24 * 24 * h**2 + 24 * 4 * s * h + 2 * h * v
    assert f"{training(dense):.4f}" == "0.2118"


def test_hash_costs_nothing() -> None:
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


def test_without_recomputation_training_is_three_forwards() -> None:
    shape = paper()
    forward = accounting.flops_per_token(shape).total
    assert accounting.training_flops_per_token(shape, recompute=False) == 3 * forward


# Odd sizes, so that no two of them can be mistaken for each other.
SMALL = ModelShape(
    num_layers=4,
    hidden_size=24,
    ffn_hidden_size=40,
    num_attention_heads=4,
    kv_channels=10,
    seq_length=18,
    padded_vocab_size=96,
)
EIGHT = {"active_cells": 48, "block_size": 6, "expansion": 3, "backend": Backend.CPU}
BUILT: dict[str, dict[str, Any]] = {
    "dense": {},
    "dense-llama": {
        "gated": True,
        "bias": False,
        "layernorm": False,
        "tied_embeddings": False,
        "num_query_groups": 2,
    },
    "dense-qwen": {"bias": False, "qkv_bias": True, "qk_layernorm": True, "layernorm": False},
    "dense-qk-layernorm": {"qk_layernorm": True, "num_query_groups": 1, "learned_positions": 20},
    "avg-k": {"sparse_layers": 4, "sffn": sparse(**EIGHT)},
    "avg-k-every-2": {"sparse_layers": 2, "sffn": sparse(**EIGHT), "learned_positions": 20},
    "avg-k-single-cells": {
        "sparse_layers": 2,
        "sffn": sparse(active_cells=40, block_size=1, expansion=2, backend=Backend.CPU),
        "gated": True,
        "tied_embeddings": False,
    },
    "switch": {"sparse_layers": 2, "sffn": sparse("switch", **EIGHT), "bias": False},
    "switch-bias": {"sparse_layers": 2, "sffn": sparse("switch", **EIGHT)},
    "switch-on-megatron": {
        "sparse_layers": 2,
        "sffn": sparse("switch", **EIGHT | {"backend": Backend.MEGATRON}),
    },
    "rand-hash": {"sparse_layers": 4, "sffn": sparse("rand-hash", **EIGHT), "gated": True},
    "vanilla-m": {"sparse_layers": 1, "sffn": sparse("vanilla-m", **EIGHT), "bias": False},
}


def build(shape: ModelShape) -> GPTModel:
    """Megatron's GPT of this shape."""
    config = SparseFFNTransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.kv_channels,
        add_bias_linear=shape.bias,
        add_qkv_bias=shape.qkv_bias,
        gated_linear_unit=shape.gated,
        activation_func=F.silu if shape.gated else F.gelu,
        normalization="LayerNorm" if shape.layernorm else "RMSNorm",
        qk_layernorm=shape.qk_layernorm,
        moe_layer_freq=(
            layer_pattern(f"every:{shape.num_layers // shape.sparse_layers}", shape.num_layers)
            if shape.sffn
            else 1
        ),
        sffn=shape.sffn,
        moe_router_dtype="fp32",
        transformer_impl="local",
        masked_softmax_fusion=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    if shape.sffn is None:
        spec = get_gpt_decoder_block_spec(config, False, normalization=config.normalization)
    else:
        spec = block_spec(GPTModelConfig(transformer=config))
    return GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=shape.padded_vocab_size,
        max_sequence_length=shape.learned_positions or shape.seq_length,
        share_embeddings_and_output_weights=shape.tied_embeddings,
        position_embedding_type="learned_absolute" if shape.learned_positions else "rope",
    )


@pytest.mark.parametrize("name", BUILT)
def test_parameters_of_the_built_model(name: str, one_rank: None) -> None:
    shape = dataclasses.replace(SMALL, **BUILT[name])
    count = accounting.count_parameters(shape)
    assert count.total == sum(parameter.numel() for parameter in build(shape).parameters())


@pytest.mark.parametrize("name", BUILT)
def test_active_parameters_leave_out_the_other_blocks(name: str) -> None:
    shape = dataclasses.replace(SMALL, **BUILT[name])
    count = accounting.count_parameters(shape)
    if shape.sffn is None:
        assert count.active == count.total
        return
    others = (shape.sffn.num_blocks - shape.sffn.num_active_blocks) * shape.sffn.block_size
    tables = 3 if shape.gated else 2
    assert count.total - count.active == (shape.sparse_layers * others * tables * shape.hidden_size)


@pytest.mark.parametrize("name", BUILT)
def test_flops_of_the_built_model(name: str, one_rank: None) -> None:
    shape = dataclasses.replace(SMALL, **BUILT[name])
    model = build(shape).eval()
    device = next(model.parameters()).device
    model.to(device)
    ids = torch.arange(2 * shape.seq_length, device=device).reshape(2, -1)
    positions = torch.arange(shape.seq_length, device=device).expand(2, -1)
    causal = torch.ones(shape.seq_length, shape.seq_length, device=device).triu(1).bool()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(ids, positions, causal[None, None], padding_mask=ids)
    counts = {
        module: sum(flops.values()) / ids.numel()
        for module, flops in counter.get_flop_counts().items()
    }

    def of(suffix: str) -> float:
        return sum(flops for module, flops in counts.items() if module.endswith(suffix))

    expected = accounting.flops_per_token(shape)
    # We compute the chosen blocks' keys again, which the papers do not count.
    again = 2 * 24 * 48 if name == "vanilla-m" else 0
    assert of(".self_attention") == expected.attention
    assert of(".router") == expected.router + again
    assert of(".mlp") - of(".router") == expected.feed_forward
    assert of(".output_layer") == expected.logits
    assert counts["Global"] == expected.total + again


def test_table() -> None:
    shape = paper(block_size=64)
    assert (
        accounting.table(shape, Exchange(expert_parallel_size=4, bytes_per_number=2))
        == """\
sparse feed-forward: avg-k, 64 of 1024 blocks of 64 cells (E = 16) in 4 of 24 layers
  parameters                            857.1 M
  active parameters                     353.8 M
  FLOPs per token, forward              916.6 M
  FLOPs over dense                     +0.924 %
  sent per token and layer, alltoall    12.7 kB
    with Megatron's alltoall           196.6 kB
    with Megatron's allgather           27.6 kB"""
    )
    baseline = dataclasses.replace(shape.sffn, backend=Backend.MEGATRON)
    theirs = accounting.table(
        dataclasses.replace(shape, sffn=baseline), Exchange(expert_parallel_size=4)
    )
    assert "sent" not in theirs and "Megatron's alltoall" in theirs
    assert "sent" not in accounting.table(shape)
    assert "sent" not in accounting.table(shape, Exchange())
    dense = accounting.table(accounting.dense_equivalent(shape), Exchange(expert_parallel_size=4))
    assert dense.splitlines() == [
        "feed-forward: dense, 4096 cells in 24 layers",
        "  parameters                  353.8 M",
        "  active parameters           353.8 M",
        "  FLOPs per token, forward    908.2 M",
        "  FLOPs over dense               +0 %",
    ]


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 "), (999, "999 "), (1000, "1.0 k"), (12_345_678, "12.3 M"), (2.5e15, "2500.0 T")],
)
def test_human_numbers(number: float, text: str) -> None:
    assert accounting._human(number) == text


@pytest.mark.parametrize(
    "wrong",
    [
        {"sparse_layers": 1},
        {"sffn": sparse(**EIGHT)},
        {"sparse_layers": 5, "sffn": sparse(**EIGHT)},
    ],
)
def test_sparse_layers_and_their_config_come_together(wrong: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        dataclasses.replace(SMALL, **wrong)


COMMAND = (
    "--num-layers 4 --hidden-size 24 --num-attention-heads 4 --kv-channels 10 --seq-length 18 "
    "--max-position-embeddings 20 --micro-batch-size 1 --transformer-impl local "
)


@pytest.mark.parametrize(
    ("flags", "changes"),
    [
        ("--ffn-hidden-size 40", {"learned_positions": 20, "qkv_bias": True}),
        (
            "--swiglu --disable-bias-linear --normalization RMSNorm --position-embedding-type rope "
            "--untie-embeddings-and-output-weights --group-query-attention --num-query-groups 2",
            {**BUILT["dense-llama"], "ffn_hidden_size": 64},
        ),
        (
            "--ffn-hidden-size 40 --disable-bias-linear --add-qkv-bias --qk-layernorm "
            "--normalization RMSNorm --use-rotary-position-embeddings",
            BUILT["dense-qwen"],
        ),
    ],
)
@pytest.mark.parametrize("layer", [None, sparse(**EIGHT)])
def test_shape_of_megatrons_arguments(
    flags: str,
    changes: dict[str, Any],
    layer: SparseFFNConfig | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.argv", ["pretrain", *COMMAND.split(), *flags.split()])
    monkeypatch.setenv("RANK", "0")
    args = parse_args()
    validate_args(args)
    args.padded_vocab_size = 96
    if layer is not None:
        args.moe_layer_freq = layer_pattern("every:2", 4)
        changes = changes | {"sffn": layer, "sparse_layers": 2}
    assert ModelShape.of_args(args, layer) == dataclasses.replace(SMALL, **changes)
