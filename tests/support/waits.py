"""Record the operations that would make the host wait for a GPU, on a machine without one.

`recorded()` simulates a GPU (`simulated_gpu.py`): the package takes its CUDA branches with real
tensors on the CPU. Every operation whose result the host reads, or whose output shape depends on
the data, is recorded with the innermost function of our package.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import megatron_sffn
from tests.support.simulated_gpu import simulate_gpu

PACKAGE = Path(megatron_sffn.__file__).parent

aten = torch.ops.aten
READS = {aten._local_scalar_dense, aten.is_nonzero, aten.equal}
"""Operations whose result is a number on the host."""
SHAPES = {aten.nonzero, aten.masked_select, aten.bincount, aten._unique2, aten.unique_dim}
SHAPES |= {aten.unique_consecutive, aten.unique_dim_consecutive, aten.repeat_interleave}
"""Operations whose output shape depends on the data."""
COPIES: list[tuple[Any, str]] = [(torch.Tensor, name) for name in ("tolist", "numpy", "cpu")]
COPIES += [(torch, "tensor"), (torch, "as_tensor")]
"""Functions that copy between host and device. On a CPU they dispatch no operation to count."""


class Waits:
    """Counts of waits: `file:function` of the package -> how often."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def note(self) -> None:
        """Count a wait for the innermost function of the package that is running."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(PACKAGE):
                self.counts[f"{path.relative_to(PACKAGE)}:{frame.f_code.co_name}"] += 1
                return
            frame = frame.f_back
        self.counts["outside"] += 1


class _Operations(TorchDispatchMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if would_wait(func, args, kwargs):
            self.waits.note()
        return func(*args, **kwargs)


def would_wait(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """True if an operation on GPU tensors would make the host wait."""
    packet = func.overloadpacket
    if packet is aten.repeat_interleave:
        return kwargs.get("output_size") is None
    if packet in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_):
        masks = (torch.bool, torch.uint8)
        return any(index is not None and index.dtype in masks for index in args[1])
    return packet in READS or packet in SHAPES


@contextlib.contextmanager
def simulated_gpu() -> Iterator[None]:
    """Within this context the package takes all tensors for tensors on an H100."""
    with pytest.MonkeyPatch.context() as patch:
        simulate_gpu(patch)
        yield


def recorded(step: Callable[[], object]) -> dict[str, int]:
    """The waits of a step: `file:function` of the package -> how often."""
    waits = Waits()
    with simulated_gpu(), pytest.MonkeyPatch.context() as patch, _Operations(waits):
        for owner, name in COPIES:
            patch.setattr(owner, name, _recording(waits, getattr(owner, name)))
        step()
    return dict(waits.counts)


def _recording(waits: Waits, function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, which also records a wait."""

    def recording(*args: Any, **kwargs: Any) -> Any:
        # A new tensor without a device stays on the host.
        if isinstance(args[0], torch.Tensor) or kwargs.get("device") is not None:
            waits.note()
        return function(*args, **kwargs)

    return recording
