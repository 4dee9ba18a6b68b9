"""The names of the backends, and the checks of device and dtype that all ops share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from megatron_sffn.ops import device
from megatron_sffn.utils.errors import ConfigError

BACKENDS = ("auto", "naive", "torch", "grouped", "masked", "bags", "quack", "cpu", "triton")
"""`auto` is the fastest for a device, `naive` the oracle. `torch`, `grouped`, `masked` and `bags`
call torch, `quack` the package quack-kernels; `cpu` is C++. docs/backends.md compares them."""


def check(backend: str, tensor: Tensor) -> None:
    """Raise `ConfigError` if a backend does not exist, or cannot compute on the tensor's device."""
    if backend not in BACKENDS:
        raise ConfigError(f"backend {backend!r} does not exist; use one of {', '.join(BACKENDS)}")
    if backend == "cpu" and device.is_gpu(tensor):
        raise ConfigError(
            "backend cpu computes on a CPU, but the tensors are on a GPU; use auto or torch"
        )


def triton_for(load: Callable[[], Any], tensor: Tensor) -> Any:
    """The module `triton.py` of an op, imported at the first call.

    Args:
        load: imports the module by an `import` statement, which `torch.compile` can follow.
        tensor: a tensor on the device and in the dtype to compute in.

    Raises:
        ConfigError: if the package triton is missing, the tensor is on a CPU, or its dtype is not
            one of the module's `DTYPES`.
    """
    try:
        # Imported late, because it takes a second, and a CPU run never needs it.
        kernels = load()
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise ConfigError(
            "backend triton needs the package triton, which is not installed; install it, or use "
            "auto or torch"
        ) from None
    if tensor.dtype not in kernels.DTYPES:
        raise ConfigError(
            f"backend triton computes in float32, bfloat16 or float16, but the tensors are "
            f"{tensor.dtype}; use auto or torch"
        )
    if not (device.is_gpu(tensor) or kernels.INTERPRETED):
        raise ConfigError(
            "backend triton computes on a GPU, but the tensors are on a CPU; use auto, torch or cpu"
        )
    return kernels
