"""A `ModelShape` has the sizes in Megatron's arguments."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from megatron.training.arguments import parse_args, validate_args

from megatron_sffn.accounting import ModelShape
from megatron_sffn.nn.config import SparseFFNConfig
from megatron_sffn.nn.layer_pattern import layer_pattern
from tests.accounting.models import DENSE, SMALL, sparse

pytestmark = pytest.mark.filterwarnings("ignore:'type' is deprecated:DeprecationWarning")


@pytest.mark.parametrize(
    "changes",
    [
        {"sparse_layers": 1},
        {"sffn": sparse()},
        {"sparse_layers": 5, "sffn": sparse()},
    ],
)
def test_sparse_layers_and_their_config_come_together(changes: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        dataclasses.replace(SMALL, **changes)


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
            {**DENSE["dense-llama"], "ffn_hidden_size": 64},
        ),
        (
            "--ffn-hidden-size 40 --disable-bias-linear --add-qkv-bias --qk-layernorm "
            "--normalization RMSNorm --use-rotary-position-embeddings",
            DENSE["dense-qwen"],
        ),
    ],
)
@pytest.mark.parametrize("layer", [None, sparse()])
def test_the_shape_has_the_sizes_of_megatrons_arguments(
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
