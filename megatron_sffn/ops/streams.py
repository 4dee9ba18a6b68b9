"""Work beside the current CUDA stream: a copy to the host, or a computation.

Inputs: tensors of any device. Outputs: the same results in plain order where there are no streams.
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
    """The stream of a device for one use; made once, since each costs a queue of the GPU."""
    return torch.cuda.Stream(device=index)


class HostCopy:
    """Numbers on their way from the device to the host.

    The copy runs on a stream of its own into pinned memory, so that whatever is queued after it on
    the current stream neither delays it nor is delayed by it.

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
        numbers.record_stream(stream)

    def wait(self) -> list[Any]:
        """Wait for the copy; the numbers as nested lists."""
        if self._event is not None:
            self._event.synchronize()
        return self._numbers.tolist()


def start_beside(compute: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    """Begin `compute(x)` on a stream beside the current one.

    Args:
        compute: a differentiable function. Autograd runs its backward on the same stream, and
            orders that among the others.
        x: its input.

    Returns:
        A function that makes the current stream wait for the result, and returns it.
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
