"""Simulate a GPU: replace the package's questions about a device by the answers of a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor

from megatron_sffn.ops import device

H100 = "NVIDIA H100 80GB HBM3"


def simulate_gpu(
    patch: pytest.MonkeyPatch,
    *,
    capability: tuple[int, int] = (9, 0),
    name: str = H100,
    is_gpu: Callable[[Tensor], bool] = lambda tensor: True,
) -> None:
    """Until the patch is undone, the package takes tensors for GPU tensors.

    Args:
        patch: replaces the functions of `ops/device.py`.
        capability: compute capability of the GPU.
        name: of the GPU.
        is_gpu: True for a tensor on the GPU.
    """
    patch.setattr(device, "is_gpu", is_gpu)
    patch.setattr(device, "capability", lambda tensor: capability)
    patch.setattr(device, "name", lambda tensor: name)
