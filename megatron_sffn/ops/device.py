"""What kind of device a tensor is on: the only place in `ops/` that asks.

The choice of a backend hangs on the answers. Every question about the hardware goes through this
module, so that a test can play a CUDA machine on the CPU by replacing these functions.
"""

from __future__ import annotations

import torch
from torch import Tensor


def is_gpu(tensor: Tensor) -> bool:
    """Whether a tensor is on a CUDA device."""
    return tensor.is_cuda


def capability(tensor: Tensor) -> tuple[int, int]:
    """Compute capability of a tensor's device, such as (9, 0) for an H100; (0, 0) for a CPU."""
    if not is_gpu(tensor):
        return 0, 0
    properties = torch.cuda.get_device_properties(tensor.device)
    return properties.major, properties.minor


def name(tensor: Tensor) -> str:
    """Name of a tensor's device, such as "NVIDIA H100 80GB HBM3"; "cpu" for a CPU."""
    # Not `get_device_name`, at which torch.compile breaks the graph: it knows that properties are
    # constants.
    return torch.cuda.get_device_properties(tensor.device).name if is_gpu(tensor) else "cpu"


def current() -> torch.device | int:
    """Where new weights and buffers are made: this process's CUDA device, or the CPU.

    Raises:
        RuntimeError: torch's, if there is a CUDA device and it cannot be used.
    """
    try:
        return torch.cuda.current_device()
    except (AssertionError, RuntimeError):  # torch without CUDA, or without a driver
        if torch.cuda.is_available():
            raise
        return torch.device("cpu")


def has_streams(tensor: Tensor) -> bool:
    """Whether work on a tensor is queued in CUDA streams; False for a CPU that plays a GPU."""
    return tensor.is_cuda
