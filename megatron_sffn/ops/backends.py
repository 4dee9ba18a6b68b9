"""Who computes an op: the names, and what each needs.

Enters: a name and the tensor that decides. Leaves: nothing, the Triton kernels, or the reason why
not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from megatron_sffn.ops import device
from megatron_sffn.utils.errors import ConfigError

BACKENDS = ("auto", "naive", "torch", "grouped", "masked", "bags", "quack", "cpu", "triton")
"""The fastest for a device, the oracle, plain torch four times, quack-kernels, C++, Triton."""


def check(backend: str, tensor: Tensor) -> None:
    """Raise `ConfigError` for a name that is none, or one that cannot compute on the device."""
    if backend not in BACKENDS:
        raise ConfigError(f"backend {backend!r} does not exist; use one of {', '.join(BACKENDS)}")
    if backend == "cpu" and device.is_gpu(tensor):
        raise ConfigError(
            "backend cpu computes on a CPU, but the tensors are on a GPU; use auto or torch"
        )


def triton_for(load: Callable[[], Any], tensor: Tensor) -> Any:
    """The module `triton` of an op's package.

    Args:
        load: imports the module, by a statement, which `torch.compile` follows.
        tensor: that it shall compute on.

    Raises:
        ConfigError: without the package triton, on a CPU, or in another dtype than its `DTYPES`.
    """
    try:
        # Not at the top of the op: it takes a second, which a machine without a GPU need not wait.
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
