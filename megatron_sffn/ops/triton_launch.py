"""How Triton kernels are started: in one place, so that a report can see what would be compiled."""

from __future__ import annotations

from typing import Any

import torch
import triton

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether the kernels run on a CPU, in Triton's interpreter."""


def launch(kernel: Any, programs: int, *, warps: int, stages: int, **arguments: Any) -> None:
    """Start a kernel on the device of its tensors, and on that device's current stream.

    Triton itself starts a kernel on the current device, whatever device the tensors are on.

    Args:
        kernel: what `triton.jit` made.
        programs: how many.
        warps: of a program.
        stages: of the pipeline of its loops.
        arguments: of the kernel, by name.
    """
    tensor = next(a for a in arguments.values() if isinstance(a, torch.Tensor))
    # Does nothing for a tensor on a CPU.
    with torch.cuda.device_of(tensor):
        kernel[(programs,)](**arguments, num_warps=warps, num_stages=stages)
