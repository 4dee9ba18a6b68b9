"""The hardware that a tensor is on.

Design notes: backends are chosen by these functions. All of `ops/` uses this module, so that a test
can simulate a CUDA machine on the CPU by replacing them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def is_gpu(tensor: Tensor) -> bool:
    """True if a tensor is on a CUDA device."""
    return tensor.is_cuda


def capability(tensor: Tensor) -> tuple[int, int]:
    """Compute capability of a tensor's device, such as (9, 0) for an H100; (0, 0) for a CPU."""
    if not is_gpu(tensor):
        return 0, 0
    properties = torch.cuda.get_device_properties(tensor.device)
    return properties.major, properties.minor


def name(tensor: Tensor) -> str:
    """Name of a tensor's device, such as "NVIDIA H100 80GB HBM3"; "cpu" for a CPU."""
    # `get_device_name` would break the graph of torch.compile, which takes device properties as
    # constants.
    return torch.cuda.get_device_properties(tensor.device).name if is_gpu(tensor) else "cpu"


def current() -> torch.device | int:
    """The device for new weights and buffers: this process's CUDA device, or the CPU.

    Raises:
        RuntimeError: from torch, if there is a CUDA device that cannot be used.
    """
    try:
        return torch.cuda.current_device()
    except (AssertionError, RuntimeError):  # torch without CUDA, or without a driver
        if torch.cuda.is_available():
            raise
        return torch.device("cpu")


def has_streams(tensor: Tensor) -> bool:
    """True if work on a tensor is queued in CUDA streams.

    Unlike `is_gpu` it is never replaced by a test: a CPU that simulates a GPU has no streams.
    """
    return tensor.is_cuda
