"""The choice of `auto` on a GPU, which these tests simulate by replacing `ops/device.py`."""

from __future__ import annotations

import logging

import pytest
import torch

from megatron_sffn.nn.config import Backend, ConfigError, SparseFFNConfig
from megatron_sffn.nn.routers import ROUTERS
from megatron_sffn.nn.transformer_config import SparseFFNTransformerConfig
from megatron_sffn.ops.block_ffn import Pairs, choose_backend
from megatron_sffn.ops.block_ffn.choose_backend import Shape
from tests.support.simulated_gpu import simulate_gpu

HALF, SINGLE = torch.bfloat16, torch.float32


def shape(g: int, spread: float, *, tokens: int = 16384, width: int = 4096) -> Shape:
    """T tokens with 4·D active cells each, in a layer with `spread` times as many cells."""
    active = max(1, 4 * width // g)
    return Shape(
        rows=tokens,
        pairs=tokens * active,
        blocks=int(active * spread),
        cells=g,
        width=width,
        key_width=width,
    )


@pytest.mark.parametrize(
    "g, spread, dtype, capability, backend",
    [
        (1024, 16, HALF, (9, 0), "grouped"),
        (1024, 1, HALF, (9, 0), "masked"),
        (256, 4, HALF, (9, 0), "grouped"),
        (256, 4, HALF, (10, 0), "grouped"),
        (128, 16, HALF, (9, 0), "grouped"),
        (64, 4, HALF, (9, 0), "masked"),
        (64, 16, HALF, (9, 0), "grouped"),
        (16, 16, HALF, (9, 0), "masked"),
        (1, 4, HALF, (9, 0), "masked"),
        (1, 16, HALF, (9, 0), "masked"),
        (1, 1024, HALF, (9, 0), "bags"),
        # `grouped` does not exist, or is a loop inside torch.
        (1024, 16, HALF, (8, 0), "torch"),
        (1024, 16, torch.float16, (9, 0), "torch"),
        (1024, 4, SINGLE, (9, 0), "torch"),
        (64, 4, HALF, (8, 0), "masked"),
        (64, 2, SINGLE, (9, 0), "torch"),
        (16, 4, SINGLE, (9, 0), "masked"),
        (252, 16, HALF, (9, 0), "torch"),
    ],
)
def test_auto_chooses_the_backend_with_the_least_estimate(
    g: int,
    spread: float,
    dtype: torch.dtype,
    capability: tuple[int, int],
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    simulate_gpu(monkeypatch, capability=capability, name="a GPU")
    best, reason = choose_backend.choose(shape(g, spread), torch.empty(0, dtype=dtype))
    assert best == backend, (reason, choose_backend.estimates(shape(g, spread), dtype))


def test_auto_for_values_without_keys_and_without_pairs_and_its_log_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    simulate_gpu(monkeypatch, capability=(8, 6), name="a GPU")
    tensor = torch.empty(0, dtype=HALF)
    only_values = Shape(rows=8, pairs=32, blocks=512, cells=1, width=64, key_width=0)
    assert choose_backend.choose(only_values, tensor)[0] == "bags"
    no_pairs = Shape(rows=0, pairs=0, blocks=64, cells=64, width=64, key_width=64)
    assert choose_backend.choose(no_pairs, tensor)[0] in ("masked", "torch")
    monkeypatch.setattr(choose_backend, "_logged", set())
    with caplog.at_level(logging.INFO, logger="megatron_sffn"):
        for spread in (4, 5, 6):
            choose_backend.choose_and_log(shape(64, spread), tensor)
    (record,) = caplog.records
    assert "masked for blocks of 64 cells in bfloat16, 1 in 4.0 active" in record.message
    assert "grouped needs a GPU of capability 9.0 or newer, and a GPU has 8.6" in record.message


def test_auto_is_estimated_on_a_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    x, tables = torch.zeros(5, 64), torch.zeros(2, 6, 64, 64)
    ids = torch.arange(6, dtype=torch.int32)
    call = (x, *tables, Pairs(rows=ids, blocks=ids))
    assert choose_backend.resolve("auto", *call) == "auto"
    simulate_gpu(monkeypatch)
    assert (
        choose_backend.resolve("auto", *call)
        == choose_backend.choose(
            Shape(rows=5, pairs=6, blocks=6, cells=64, width=64, key_width=64), x
        )[0]
    )
    assert choose_backend.resolve("masked", *call) == "masked"
    with pytest.raises(ConfigError, match="computes in bfloat16, but the tensors are"):
        choose_backend.resolve("grouped", *call)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"block_size": 4}, "--sffn-block-size / --expert-tensor-parallel-size is 4"),
        ({"hidden_size": 36}, "--hidden-size is 36"),
        ({"expert_tensor_parallel_size": 2}, "--expert-tensor-parallel-size is 4"),
        ({"router": "pkm", "block_size": 1, "expansion": 16}, "--sffn-router pkm has values alone"),
        ({"router": "lorkm", "rank": 12}, "the width of keys is 12"),
    ],
)
def test_sizes_that_a_grouped_product_cannot_take_are_refused_at_the_start(
    changes: dict[str, object], words: str
) -> None:
    numbers = {"active_cells": 16, "block_size": 8, "expansion": 4, "hidden_size": 32} | changes
    router = ROUTERS[numbers.pop("router", "switch")]
    options = {"rank": numbers.pop("rank")} if "rank" in numbers else {}
    megatron = {name: numbers.pop(name) for name in list(numbers) if name in MEGATRON}
    sffn = SparseFFNConfig(router=router(**options), backend=Backend.GROUPED, **numbers)
    with pytest.raises(ConfigError, match=words) as caught:
        SparseFFNTransformerConfig(
            num_layers=1,
            num_attention_heads=4,
            add_bias_linear=False,
            moe_router_dtype="fp32",
            tensor_model_parallel_size=megatron.get("expert_tensor_parallel_size", 1),
            sequence_parallel="expert_tensor_parallel_size" in megatron,
            sffn=sffn,
            **megatron,
        )
    assert str(caught.value).endswith("; use auto, masked or torch")


MEGATRON = ("hidden_size", "expert_tensor_parallel_size")
