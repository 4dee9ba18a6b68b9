"""How Triton kernels are started: every one through the operator `megatron_sffn::launch_triton`.

Inputs: a kernel, its grid and its arguments by name. Outputs: the tensors that the kernel writes.

Design notes:
- torch knows nothing of a Triton kernel that Python starts, and fake tensors and `torch.compile`
  fail at it. The operator names the tensors that are read and those that are written. Its fake does
  nothing, because nothing is returned. All else of a product is plain torch: the allocation of
  results, and the order and the tiles of pairs, which are made once a step as without an operator.
- One operator for all kernels, below the products. Operators for the products would have to take
  what is derived from the pairs as tensors, in other shapes for each form and each device, and
  each fused form would need a schema and a fake of its own.
- `torch.library.triton_op` does the same for compiled kernels, but refuses those of Triton's
  interpreter, in which the tests run.
- `Library.define` and `impl`, because `torch.library.custom_op` took seven times as long for a
  call: it counts versions and looks for gradients in Python, and neither is of use below an
  `autograd.Function`.
"""

from __future__ import annotations

import functools
import pkgutil
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether the kernels run on a CPU, in Triton's interpreter."""

_library = torch.library.Library("megatron_sffn", "FRAGMENT")
_library.define(
    "launch_triton(str kernel, SymInt programs, int warps, int stages, str names, "
    "Tensor(a!)[] written, Tensor[] read, SymInt[] numbers, str[] words) -> ()"
)


def launch(
    kernel: Any,
    programs: int,
    *,
    warps: int,
    stages: int,
    writes: Sequence[str] = ("result",),
    **arguments: Tensor | int | str | None,
) -> None:
    """Start a kernel on the device of its tensors, and on that device's current stream.

    Args:
        kernel: what `triton.jit` made of a function of a module, where it has its own name.
        programs: how many.
        warps: of a program.
        stages: of the pipeline of its loops.
        writes: names of the arguments that the kernel writes, also those that it reads first.
        arguments: of the kernel, by name; None stands for a null pointer.
    """
    written = {name: a for name in writes if (a := arguments.pop(name)) is not None}
    read, numbers, words = {}, {}, {}
    for name, argument in arguments.items():
        if isinstance(argument, Tensor):
            read[name] = argument
        elif isinstance(argument, str):
            words[name] = argument
        elif argument is not None:
            # A truth value is no number for an operator.
            numbers[name] = int(argument) if isinstance(argument, bool) else argument
    torch.ops.megatron_sffn.launch_triton.default(
        _name(kernel),
        programs,
        warps,
        stages,
        " ".join((*written, *read, *numbers, *words)),
        list(written.values()),
        list(read.values()),
        list(numbers.values()),
        list(words.values()),
    )


def power_of_2(size: int, least: int, most: int) -> int:
    """The power of two that holds `size`, within bounds that are powers of two.

    By comparisons, because torch.compile may have left the size open: it then learns the sizes for
    which the answer holds.
    """
    power = least
    while power < most and power < size:
        power *= 2
    return power


def _name(kernel: Any) -> str:
    """Where a kernel is, as `_kernel` takes it."""
    return f"{kernel.fn.__module__}:{kernel.fn.__name__}"


def _start(
    kernel: str,
    programs: int,
    warps: int,
    stages: int,
    names: str,
    written: list[Tensor],
    read: list[Tensor],
    numbers: list[int],
    words: list[str],
) -> None:
    """The operator `launch_triton`: `names` are those of all that follows, in this order."""
    function = _kernel(kernel)
    arguments = dict.fromkeys(function.arg_names)
    arguments.update(zip(names.split(), (*written, *read, *numbers, *words), strict=True))
    # Triton itself starts a kernel on the current device, whatever device the tensors are on. Does
    # nothing for a tensor on a CPU.
    with torch.cuda.device_of(written[0]):
        function[(programs,)](**arguments, num_warps=warps, num_stages=stages)


def _start_fake(*_: Any) -> None:
    """Of tensors without numbers: nothing is returned, and nothing changes its shape."""


# A name, since a compiled graph that is loaded from torch's cache has met no kernel.
_kernel = functools.cache(pkgutil.resolve_name)
_library.impl("launch_triton", _start, "CompositeExplicitAutograd")
torch.library.register_fake("megatron_sffn::launch_triton", _start_fake, lib=_library)
