"""Patches for every machine: each replacement does what Megatron needs."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch
from megatron.core.datasets import utils as datasets_utils
from megatron.core.optimizer import clip_grads
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_sffn.patches import megatron
from megatron_sffn.patches.registry import DROPPED, resolve

ROWS = [*megatron.PATCHES, *megatron.FASTER_OPTIMIZER]


def test_installing_again_replaces_nothing() -> None:
    targets = [row.target for row in ROWS if row.target not in DROPPED]
    before = [getattr(*resolve(target)) for target in targets]
    megatron.install()
    assert [getattr(*resolve(target)) for target in targets] == before


@pytest.mark.parametrize("fused", [set(), {"transformer_engine"}, {"amp_C"}])
def test_the_optimizer_is_left_alone_where_a_fused_one_is_installed(
    monkeypatch: pytest.MonkeyPatch, fused: set[str]
) -> None:
    applied: list[str] = []
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: object() if name in fused else None
    )
    monkeypatch.setattr(megatron, "apply", lambda row: applied.append(row.target))
    megatron.install()
    expected = megatron.PATCHES if fused else ROWS
    assert applied == [row.target for row in expected]


@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_a_norm_marks_its_parameters_for_the_sum_over_tp(
    normalization: str, sequence_parallel: bool
) -> None:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=2,
        normalization=normalization,
        tensor_model_parallel_size=2,
        sequence_parallel=sequence_parallel,
    )
    config.persist_layer_norm = True  # asks for apex's kernel, which torch's norm ignores
    norm = WrappedTorchNorm(config, 8, 1e-3)
    assert type(norm) is getattr(torch.nn, normalization)
    assert norm.eps == 1e-3
    marks = [parameter.sequence_parallel for parameter in norm.parameters()]
    assert marks == [sequence_parallel] * (2 if normalization == "LayerNorm" else 1)
    assert config.sequence_parallel is sequence_parallel


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_adam_is_fused_and_takes_the_same_steps(kind: type[torch.optim.Adam]) -> None:
    steps = {}
    for fused in (None, False):
        weight = torch.nn.Parameter(torch.linspace(-1, 1, 101, dtype=torch.float64))
        optimizer = kind([weight], lr=0.1, weight_decay=0.01, fused=fused)
        for step in range(3):
            weight.grad = (weight.detach() + step).sin()
            optimizer.step()
        steps[optimizer.defaults["fused"]] = weight.detach()
    torch.testing.assert_close(steps[True], steps[False], rtol=1e-13, atol=1e-13)
    assert not kind([weight], foreach=True).defaults["fused"]
    assert not kind([weight], capturable=True).defaults["fused"]


def test_gradients_are_clipped_in_place() -> None:
    weights = [torch.nn.Parameter(torch.zeros(5)) for _ in range(2)]
    gradients = [torch.arange(5.0), torch.ones(5)]
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient.clone()
    pointers = [weight.grad.data_ptr() for weight in weights]
    clip_grads.clip_grad_by_total_norm_fp32(weights, max_norm=1.0, total_norm=4.0)
    for weight, gradient, pointer in zip(weights, gradients, pointers, strict=True):
        torch.testing.assert_close(weight.grad, gradient / (4.0 + 1e-6))
        assert weight.grad.data_ptr() == pointer


def test_the_index_helper_is_compiled_only_if_it_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    datasets_utils.compile_helpers()  # Megatron's own exits here: the wheel has no Makefile
    compiled: list[int] = []
    helper = megatron._compile_unless_compiled(lambda: compiled.append(1))
    helper()
    assert compiled == []
    monkeypatch.setitem(sys.modules, "megatron.core.datasets.helpers_cpp", None)
    helper()
    assert compiled == [1]
