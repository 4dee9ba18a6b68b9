"""The pattern of sparse layers, of a GPT and of a hybrid model."""

from __future__ import annotations

import pytest

from megatron_sffn.nn.layer_pattern import (
    count_attention,
    count_layers,
    cut,
    gpt_layer,
    gpt_name,
    gpt_pattern,
    hybrid_layers,
    hybrid_pattern,
    layer_pattern,
    pipeline_segments,
    prediction_layers,
)
from megatron_sffn.utils.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "layers", "sparse"),
    [
        ("every:1", 3, [0, 1, 2]),
        ("every:2", 5, [1, 3]),
        ("every:5", 5, [4]),
        ("every:6", 24, [5, 11, 17, 23]),
        ("5,11,17,23", 24, [5, 11, 17, 23]),
        ("0", 1, [0]),
        ("3,0", 4, [0, 3]),
        ("every:2:0", 5, [0, 2, 4]),
        ("every:6:2", 24, [2, 8, 14, 20]),
        ("every:6:11", 24, [11, 17, 23]),
        ("first:2", 4, [0, 1]),
        ("last:3", 8, [5, 6, 7]),
        ("last:4", 4, [0, 1, 2, 3]),
        (" 1, 2 ", 4, [1, 2]),
    ],
)
def test_a_layer_pattern_selects_the_sparse_layers(
    text: str, layers: int, sparse: list[int]
) -> None:
    pattern = layer_pattern(text, layers)
    assert len(pattern) == layers
    assert [index for index, chosen in enumerate(pattern) if chosen == 1] == sparse
    assert set(pattern) <= {0, 1}


@pytest.mark.parametrize(
    ("text", "problem", "remedy"),
    [
        ("4", "names layer 4 of a model with --num-layers 4", "indices from 0 to 3"),
        ("0,7,9", "names layer 7", "indices from 0 to 3"),
        ("-1", "names layer -1", "indices from 0 to 3"),
        ("every:5", "names no layer", "last:N with N from 1 to 4"),
        ("every:0", "names no layer", "last:N with N from 1 to 4"),
        ("every:-1", "names no layer", "last:N with N from 1 to 4"),
        ("every:2:4", "names layer 4", "indices from 0 to 3"),
        ("every:2:-1", "names layer -1", "indices from 0 to 3"),
        ("every:0:1", "names no layer", "every:N"),
        ("last:5", "names layer -1", "last:N with N from 1 to 4"),
        ("first:5", "names layer 4", "first:N"),
        ("last:0", "names no layer", "last:N with N from 1 to 4"),
        ("every:2:0:1", "is neither", "every:2:0"),
        ("middle:2", "is neither", "last:4"),
        ("last:x", "is neither", "last:4"),
        ("every:", "is neither", "write for example every:6"),
        ("every:1.5", "is neither", "write for example every:6"),
        ("Every:2", "is neither", "write for example every:6"),
        ("1,,2", "is neither", "write for example every:6"),
        ("", "is neither", "write for example every:6"),
        ("2,1,2", "names a layer twice", "name each layer once"),
    ],
)
def test_an_invalid_layer_pattern_is_refused(text: str, problem: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        layer_pattern(text, 4)
    assert f"--sffn-layers {text} {problem}" in str(refusal.value)
    assert remedy in str(refusal.value)


@pytest.mark.parametrize(
    ("chunks", "pattern"),
    [([3], "*-*E*E"), ([1, 2], "*-|*E*E"), ([1, 1, 1, 0], "*-|*E|*E|")],
)
def test_a_gpt_has_a_hybrid_model_with_the_same_layers(chunks: list[int], pattern: str) -> None:
    assert hybrid_pattern([0, 1, 1], chunks, latent=False) == pattern
    assert hybrid_pattern([0, 1, 1], chunks, latent=True) == pattern.replace("*", "+")
    assert hybrid_layers(pattern) == "*-*E*E"
    assert pipeline_segments(pattern) == len(chunks)
    assert layer_pattern("every:9", 1, pattern) == [0, 0, 0, 1, 0, 1]
    assert count_attention(pattern) == 3
    assert gpt_pattern(pattern) == [0, 1, 1]
    assert [gpt_layer(pattern, index) for index in range(6)] == [0, 0, 1, 1, 2, 2]


def test_predictions_follow_the_layers() -> None:
    pattern = hybrid_pattern([0, 1], [1, 1], latent=False, predicted_tokens=2)
    assert pattern == "*-|*E/*E/*E"
    assert prediction_layers(pattern) == ["*E", "*E"]
    assert count_layers(4, 2, pattern) == 8
    assert count_layers(4, 2, None) == 6
    assert hybrid_layers(pattern) == "*-*E"


def test_layers_of_a_kind_are_numbered_in_order_where_kinds_do_not_alternate() -> None:
    assert [gpt_layer("E*-|*E", index) for index in range(5)] == [0, 0, 1, 1, 2]


@pytest.mark.parametrize("pattern", ["*EE", "E*", "**EE", "*E*", ""])
def test_a_pattern_without_alternating_layers_is_no_gpt(pattern: str) -> None:
    assert gpt_pattern(pattern) is None


@pytest.mark.parametrize(
    ("pattern", "stages", "expected"),
    [("*-*E", 2, "*-|*E"), ("*-*E", 1, "*-*E"), ("*|-*E", 2, "*|-*E"), ("**EE/*E", 2, "**|EE/*E")],
)
def test_a_pattern_without_cuts_is_cut_into_equal_stages(
    pattern: str, stages: int, expected: str
) -> None:
    assert cut(pattern, stages) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("decoder.layers.3.mlp.experts.keys", "decoder.layers.1.mlp.experts.keys"),
        ("decoder.layers.2.self_attention.x", "decoder.layers.1.self_attention.x"),
        ("decoder.final_norm.weight", "decoder.final_layernorm.weight"),
        ("embedding.word_embeddings.weight", "embedding.word_embeddings.weight"),
    ],
)
def test_weights_of_a_hybrid_model_have_a_name_in_the_gpt(name: str, expected: str) -> None:
    assert gpt_name(name, "*-|*E") == expected
