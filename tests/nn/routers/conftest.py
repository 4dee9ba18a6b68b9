"""Helpers of the router tests: the config of a small layer, and routers on one rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_sffn.nn.config import RouterConfig, SparseFFNConfig
from megatron_sffn.nn.transformer_config import SparseFFNTransformerConfig

D = 6
T, B, G = 20, 12, 2


def tables(blocks: int = B, cells: int = G) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens `[T, D]`, keys and values `[blocks, cells, D]`, in float64."""
    torch.manual_seed(blocks * cells)
    shape = (blocks, cells, D)
    return (torch.randn(T, D).double(), torch.randn(shape).double(), torch.randn(shape).double())


def transformer(router: RouterConfig, **numbers: Any) -> SparseFFNTransformerConfig:
    """A float64 config; `numbers` are the layer's (g, E, k) or fields of Megatron's config."""
    sffn = {"active_cells": 8, "block_size": 2, "expansion": 3}
    for name in list(sffn):
        sffn[name] = numbers.pop(name, sffn[name])
    return SparseFFNTransformerConfig(
        num_layers=2,
        hidden_size=D,
        num_attention_heads=1,
        add_bias_linear=False,
        sffn=SparseFFNConfig(router=router, **sffn),
        **{
            "params_dtype": torch.float64,
            "moe_router_dtype": "fp64",
            "moe_router_load_balancing_type": "none",
            **numbers,
        },
    )


@pytest.fixture
def build(one_rank: None) -> Callable[..., Any]:
    """`build(router_config, **numbers)`: the router of layer 1."""

    def make(router: RouterConfig, **numbers: Any) -> Any:
        built_router = router.router_class()(
            config=transformer(router, **numbers),
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        )
        built_router.set_layer_number(1)
        return built_router

    return make
