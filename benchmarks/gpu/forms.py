"""Lists the backends of the ops, and every module with the three products.

Design notes: the package itself is searched, so that a new backend or kernel is checked, timed and
tuned without a change of this file.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType
from typing import Any

import torch

from benchmarks.gpu.case import Context
from megatron_sffn.ops.backends import BACKENDS

NOT_OF_A_GPU = ("cpu",)
"""Backends that refuse a GPU."""

ORACLE = "naive"

PRODUCTS = ("to_pairs", "to_rows", "to_table")

FUSED, FUSED_PRODUCTS = "triton_fused", ("up_activated", "down_backward_activated")
"""The module of the fused products, which take their tiles from the table of `triton_grouped`."""

IN_TIME: dict[str, tuple[int, int]] = {
    "torch": (64, 1 << 30),
    "torch_backend": (64, 1 << 30),
    "bags": (1, 1),
}
"""Backend or module -> least and largest g at which it ends in time. The launches of `torch` grow
with the number of blocks, and the reads of `bags` with their cells."""


def backends(*, oracle: bool = False) -> list[str]:
    """Names of the backends for a GPU, in the order of `BACKENDS`, which begins with `auto`."""
    return [name for name in BACKENDS if name not in NOT_OF_A_GPU and (oracle or name != ORACLE)]


def too_slow(name: str, cells: int, context: Context) -> bool:
    """True if a backend or module would take too long for blocks of this size, at real sizes."""
    if context.dry:
        return False
    least, most = IN_TIME.get(name, (1, 1 << 30))
    return not least <= cells <= most


def modules() -> dict[str, ModuleType]:
    """Name -> module of `ops.block_ffn` that has the three products as functions."""
    # `from megatron_sffn.ops import block_ffn` would import the function.
    package = importlib.import_module("megatron_sffn.ops.block_ffn")
    with_products = {}
    for info in pkgutil.iter_modules(package.__path__):
        try:
            module = importlib.import_module(f"{package.__name__}.{info.name}")
        except ImportError:  # an optional package is missing
            continue
        if all(callable(getattr(module, name, None)) for name in PRODUCTS):
            with_products[info.name] = module
    return with_products


def is_interpreted(module_or_backend: str) -> bool:
    """True if a dry run computes it in Triton's interpreter."""
    return module_or_backend.startswith("triton")


def dtype_for(name: str, context: Context) -> torch.dtype:
    """bf16; in a dry run fp32 for Triton, whose interpreter cannot multiply bf16."""
    return torch.float32 if context.dry and is_interpreted(name) else torch.bfloat16


def tuned(module: Any) -> bool:
    """True if a module's kernels take their tile sizes from a table `TILES`."""
    return isinstance(getattr(module, "TILES", None), dict)
