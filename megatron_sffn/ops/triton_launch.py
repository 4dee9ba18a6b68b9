"""Launch Triton kernels, all of them through the operator `megatron_sffn::launch_triton`.

Inputs: a kernel, its grid and its arguments by name. Outputs: the tensors that the kernel writes.

Design notes:
- torch cannot see a Triton kernel that Python launches, so fake tensors and `torch.compile` fail
  at it. The operator's schema tells which tensors are read and which are written. Its fake does
  nothing, because it returns nothing. The rest of a product is plain torch: the allocation of
  results, and the order and the tiles of the pairs.
- There is one operator for all kernels, below the products. An operator per product would have to
  take everything derived from the pairs as tensors, whose shapes differ by form and device, and
  each fused form would need a schema and a fake of its own.
- `torch.library.triton_op` does the same for compiled kernels, but refuses kernels in Triton's
  interpreter, in which the tests run.
- `torch.library.custom_op` took seven times as long per call as `Library.define` and `impl`: it
  tracks versions and gradients in Python, which is of no use inside an `autograd.Function`.
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
"""True if the kernels run on a CPU, in Triton's interpreter (`TRITON_INTERPRET=1`)."""

_library = torch.library.Library("megatron_sffn", "FRAGMENT")
_library.define(
    "launch_triton(str kernel, SymInt programs, int warps, int stages, str names, "
    "Tensor(a!)[] outputs, Tensor[] inputs, SymInt[] ints, str[] strings) -> ()"
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
    """Launch a kernel on the device of its tensors, on that device's current stream.

    Args:
        kernel: a `triton.jit` function at the top level of a module, under its own name.
        programs: size of the one-dimensional grid.
        warps: warps per program.
        stages: pipeline stages of the loops.
        writes: names of the arguments that the kernel writes, or reads and writes.
        arguments: the kernel's arguments by name; None stands for a null pointer.
    """
    outputs = {name: a for name in writes if (a := arguments.pop(name)) is not None}
    inputs, ints, strings = {}, {}, {}
    for name, argument in arguments.items():
        if isinstance(argument, Tensor):
            inputs[name] = argument
        elif isinstance(argument, str):
            strings[name] = argument
        elif argument is not None:
            # The schema's integers do not accept a bool.
            ints[name] = int(argument) if isinstance(argument, bool) else argument
    torch.ops.megatron_sffn.launch_triton.default(
        _name(kernel),
        programs,
        warps,
        stages,
        " ".join((*outputs, *inputs, *ints, *strings)),
        list(outputs.values()),
        list(inputs.values()),
        list(ints.values()),
        list(strings.values()),
    )


def power_of_2(size: int, least: int, most: int) -> int:
    """The least power of two that is `size` or more, between two bounds that are powers of two.

    Computed by comparisons: if torch.compile treats the size as symbolic, each comparison becomes a
    guard.
    """
    power = least
    while power < most and power < size:
        power *= 2
    return power


def _name(kernel: Any) -> str:
    """The qualified name of a kernel, which `_kernel` resolves."""
    return f"{kernel.fn.__module__}:{kernel.fn.__name__}"


def _launch(
    kernel: str,
    programs: int,
    warps: int,
    stages: int,
    names: str,
    outputs: list[Tensor],
    inputs: list[Tensor],
    ints: list[int],
    strings: list[str],
) -> None:
    """The operator `launch_triton`; `names` are the names of the arguments after it, in order."""
    jitted = _kernel(kernel)
    arguments = dict.fromkeys(jitted.arg_names)
    arguments.update(zip(names.split(), (*outputs, *inputs, *ints, *strings), strict=True))
    # Triton launches on the current device, even if the tensors are on another one. The context
    # does nothing for a tensor on a CPU.
    with torch.cuda.device_of(outputs[0]):
        jitted[(programs,)](**arguments, num_warps=warps, num_stages=stages)


def _launch_fake(*_: Any) -> None:
    """The operator on fake tensors: it returns nothing and changes no shape."""


# The operator takes a name, because a compiled graph that torch loads from its cache can run before
# any Python code has imported the kernel.
_kernel = functools.cache(pkgutil.resolve_name)
_library.impl("launch_triton", _launch, "CompositeExplicitAutograd")
torch.library.register_fake("megatron_sffn::launch_triton", _launch_fake, lib=_library)
