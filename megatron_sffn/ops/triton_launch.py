"""How Triton kernels are started: in one place, so that a report can see what would be compiled."""

from __future__ import annotations

from typing import Any

import triton

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether the kernels run on a CPU, in Triton's interpreter."""


def launch(kernel: Any, programs: int, *, warps: int, stages: int, **arguments: Any) -> None:
    """Start a kernel.

    Args:
        kernel: what `triton.jit` made.
        programs: how many.
        warps: of a program.
        stages: of the pipeline of its loops.
        arguments: of the kernel, by name.
    """
    kernel[(programs,)](**arguments, num_warps=warps, num_stages=stages)
