"""Overlap with the current CUDA stream: a copy to the host, or a computation on a side stream.

Inputs: tensors on any device. On a CPU, which has no streams, everything runs in program order with
the same results.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from megatron_sffn.ops import device


@cache
def _side_stream(index: int, use: str) -> torch.cuda.Stream:
    """The side stream of a device for one use; cached, because each stream takes a GPU queue."""
    return torch.cuda.Stream(device=index)


class HostCopy:
    """A copy of integers from the device to the host, started at once and awaited later.

    The copy runs on its own stream into pinned memory. Work that is queued on the current stream
    after it neither delays it nor waits for it.

    Args:
        numbers: integers of any shape.
    """

    def __init__(self, numbers: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._numbers = numbers
        if not device.has_streams(numbers):
            return
        stream = _side_stream(numbers.device.index, "copy")
        stream.wait_stream(torch.cuda.current_stream(numbers.device))
        with torch.cuda.stream(stream):
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(stream)
        # The allocator must not hand out this memory before the side stream has read it.
        numbers.record_stream(stream)

    def wait(self) -> list[Any]:
        """Wait for the copy, and return the numbers as nested lists."""
        if self._event is not None:
            self._event.synchronize()
        return self._numbers.tolist()


def start_beside(compute: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    """Start `compute(x)` on a side stream.

    Args:
        compute: a differentiable function. Autograd runs its backward pass on the same side stream,
            and synchronises the streams.
        x: the input of `compute`.

    Returns:
        A function that makes the current stream wait for the result, and returns the result.
    """
    if not device.has_streams(x):
        result = compute(x)
        return lambda: result
    current = torch.cuda.current_stream(x.device)
    stream = _side_stream(x.device.index, "compute")
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        result = compute(x)
    x.record_stream(stream)

    def finish() -> Tensor:
        current.wait_stream(stream)
        result.record_stream(current)
        return result

    return finish
