"""The layers that Megatron's GPT builds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.mlp import MLP
from megatron.training.models.gpt import GPTModelConfig

from megatron_sffn.nn.config import Backend, SparseFFNConfig
from megatron_sffn.nn.layer import MegatronBackedFFN, SparseFFN, sparse_layers
from megatron_sffn.nn.layer_pattern import layer_pattern
from megatron_sffn.nn.layer_spec import block_spec
from megatron_sffn.nn.routers import ROUTERS
from megatron_sffn.nn.transformer_config import SparseFFNTransformerConfig
from tests.support.ranks import run_ranks

# Megatron's own dense MLP warns.
pytestmark = pytest.mark.filterwarnings("ignore:MLP requires ffn_hidden_size:DeprecationWarning")


def build(
    layers: str,
    *,
    backend: Backend = Backend.AUTO,
    router: str = "avg-k",
    vp_stage: int | None = None,
    **megatron: Any,
) -> GPTModel:
    """This pipeline stage, or one model chunk of it, of a GPT with four layers."""
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    config = SparseFFNTransformerConfig(
        num_layers=4,
        hidden_size=16,
        ffn_hidden_size=24,
        num_attention_heads=2,
        add_bias_linear=False,
        moe_layer_freq=layer_pattern(layers, 4),
        moe_router_load_balancing_type="none",
        pipeline_model_parallel_size=stages,
        pipeline_dtype=torch.float32,
        transformer_impl="local",
        sffn=SparseFFNConfig(
            router=ROUTERS[router](), active_cells=24, block_size=6, expansion=2, backend=backend
        ),
        **megatron,
    )
    return GPTModel(
        config=config,
        transformer_layer_spec=block_spec(GPTModelConfig(transformer=config), vp_stage),
        vp_stage=vp_stage,
        vocab_size=32,
        max_sequence_length=8,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        position_embedding_type="rope",
    )


def mlps(model: GPTModel) -> list[tuple[int, str]]:
    """Layer number and class name of every layer's MLP."""
    return [(layer.layer_number, type(layer.mlp).__name__) for layer in model.decoder.layers]


def numbers(model: GPTModel) -> list[tuple[int, int | None]]:
    """The layer numbers of the sparse layers and of their routers."""
    return [(layer.layer_number, layer.router.layer_number) for layer in sparse_layers(model)]


@pytest.mark.parametrize(
    ("backend", "name"), [(Backend.AUTO, SparseFFN), (Backend.MEGATRON, MegatronBackedFFN)]
)
@pytest.mark.parametrize("router", ["avg-k", "switch"])
@pytest.mark.parametrize(
    ("layers", "sparse"), [("every:1", [1, 2, 3, 4]), ("every:2", [2, 4]), ("0,3", [1, 4])]
)
def test_chosen_layers_are_sparse_and_all_others_are_megatrons(
    one_rank: None, layers: str, sparse: list[int], router: str, backend: Backend, name: type
) -> None:
    model = build(layers, backend=backend, router=router)
    assert mlps(model) == [
        (number, name.__name__ if number in sparse else MLP.__name__) for number in range(1, 5)
    ]
    assert numbers(model) == [(number, number) for number in sparse]


def test_a_dense_layer_is_as_wide_as_the_active_cells(one_rank: None) -> None:
    model = build("1")
    assert model.decoder.layers[0].mlp.linear_fc1.weight.shape == (24, 16)
    assert model.decoder.layers[1].mlp.experts.keys.shape == (8, 6, 16)


def test_each_layer_has_block_weights_of_its_own(one_rank: None) -> None:
    first, second = (layer.experts for layer in sparse_layers(build("0,1")))
    assert first.keys is not second.keys
    assert not torch.equal(first.keys, second.keys)


def test_the_model_runs_forward_and_backward(one_rank: None) -> None:
    model = build("every:2", attention_dropout=0.0, hidden_dropout=0.0)
    ids = torch.arange(16).reshape(2, 8)
    mask = torch.ones(8, 8).triu(1).bool()[None, None]
    loss = model(ids, torch.arange(8).expand(2, -1), mask, labels=ids)
    assert loss.shape == (2, 8)
    loss.sum().backward()
    for layer in sparse_layers(model):
        assert layer.experts.keys.grad is not None
        assert layer.experts.keys.grad.abs().sum() > 0


def stage_of(layers: str) -> dict[str, Any]:
    """The layers of this rank's pipeline stage."""
    model = build(layers)
    slots = [
        layer.submodules.mlp
        for layer in block_spec(GPTModelConfig(transformer=model.config)).layer_specs
    ]
    return {
        # Megatron sets the layer number again after it has built a layer. The spec must have it
        # too, so that the block weights are drawn when the layer is built.
        "in the spec": [slot.keywords["layer_number"] for slot in slots if slot.func is SparseFFN],
        "mlps": mlps(model),
        "numbers": numbers(model),
        "keys": {
            layer.layer_number: layer.experts.keys.detach().sum().item()
            for layer in sparse_layers(model)
        },
    }


@pytest.mark.parametrize("layers", ["every:2", "1,2"])
def test_layers_are_numbered_over_all_pipeline_stages(layers: str) -> None:
    [expected] = run_ranks(1, stage_of, layers)
    stages = run_ranks(2, stage_of, layers, pipeline_model_parallel_size=2)
    assert [number for number, _ in stages[1]["mlps"]] == [3, 4]
    for key in ("mlps", "numbers", "in the spec"):
        assert stages[0][key] + stages[1][key] == expected[key]
    # The layer number seeds the block weights, so the model is the same.
    assert stages[0]["keys"] | stages[1]["keys"] == expected["keys"]


def two_chunks_of(layers: str) -> list[Any]:
    """The layers of the two model chunks of this rank."""
    chunks = [
        build(layers, vp_stage=stage, virtual_pipeline_model_parallel_size=2) for stage in range(2)
    ]
    return [(mlps(chunk), numbers(chunk)) for chunk in chunks]


def test_layers_are_numbered_over_interleaved_stages() -> None:
    stages = run_ranks(
        2,
        two_chunks_of,
        "1,2",
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=2,
    )
    assert stages == [
        [([(1, "MLP")], []), ([(3, "SparseFFN")], [(3, 3)])],
        [([(2, "SparseFFN")], [(2, 2)]), ([(4, "MLP")], [])],
    ]
