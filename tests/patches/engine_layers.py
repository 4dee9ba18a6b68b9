"""Print the modules of a dense and a sparse layer in Megatron's Transformer Engine spec, as JSON.

This is a program, because Megatron looks for the engine only once, when it is imported. With the
argument `stand-in` it finds a package that has all of the engine's names and computes nothing.
"""

from __future__ import annotations

import importlib
import json
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch


class StandIn(ModuleType):
    """A module with any name: a class if it begins with a capital, or else a module."""

    __version__ = "2.9.0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name.islower():
            return importlib.import_module(f"{self.__name__}.{name}")
        setattr(self, name, type(name, (torch.nn.Module,), {}))
        return getattr(self, name)


class Finder(MetaPathFinder, Loader):
    """Finds the stand-in for Transformer Engine and everything in it."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name.partition(".")[0] != "transformer_engine":
            return None
        return ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def layers() -> list[dict[str, str]]:
    """Names of the modules of the two layers."""
    from megatron_sffn.patches import prepare

    prepare()
    from megatron.core import parallel_state
    from megatron.training.models.gpt import GPTModelConfig
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_sffn import SparseFFNConfig
    from megatron_sffn.nn.layer_spec import block_spec
    from megatron_sffn.nn.routers import ROUTERS
    from megatron_sffn.nn.transformer_config import SparseFFNTransformerConfig

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    config = SparseFFNTransformerConfig(
        num_layers=2,
        hidden_size=16,
        num_attention_heads=2,
        ffn_hidden_size=24,
        add_bias_linear=False,
        moe_layer_freq=[0, 1],
        moe_router_load_balancing_type="none",
        transformer_impl="transformer_engine",
        sffn=SparseFFNConfig(router=ROUTERS["avg-k"](), active_cells=24, block_size=6, expansion=2),
    )
    submodules = [
        layer.submodules for layer in block_spec(GPTModelConfig(transformer=config)).layer_specs
    ]
    return [
        {
            "qkv": layer.self_attention.submodules.linear_qkv.__name__,
            "norm": layer.pre_mlp_layernorm.__name__,
            "mlp": layer.mlp.func.__qualname__,
        }
        for layer in submodules
    ]


if __name__ == "__main__":
    if sys.argv[1:] == ["stand-in"]:
        sys.meta_path.insert(0, Finder())
    print(json.dumps(layers()))
