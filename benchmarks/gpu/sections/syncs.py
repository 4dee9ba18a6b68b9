"""Find where a training step of a sparse layer waits for the device: file, line and count.

Inputs: a layer with each router, after one step to warm up. Outputs: syncs.csv, a row per line of
the package that waited, with the number of waits in a forward and backward pass.

Design notes: on a GPU torch warns about every call that waits (`torch.cuda.set_sync_debug_mode`); a
dry run counts the operators that would wait. In both cases the innermost frame of the package is
the line.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu.case import Case, Context
from benchmarks.gpu.sparse_layer import sparse_layer
from benchmarks.machine import ROOT, Platform, adapt, one_rank
from benchmarks.rows import append
from tests.support.waits import would_wait

PACKAGE = str(ROOT / "megatron_sffn")


@dataclass(frozen=True, kw_only=True)
class Row:
    """The waits of one line of code; also the columns of syncs.csv.

    Args:
        router: name.
        backend: name.
        line: file and number, relative to the repository.
        count: waits in one forward and backward pass of one layer.
    """

    router: str
    backend: str
    line: str
    count: int


def cases(context: Context) -> list[Case]:
    """A layer with each router."""
    adapt()
    from megatron_sffn.nn.routers import ROUTERS

    routers = [name for name in ROUTERS if name != "dense"]
    return [
        Case(name=router, run=functools.partial(count, router, "auto", context))
        for router in routers[: context.choose(len(routers), 4)]
    ]


def count(router: str, backend: str, context: Context) -> dict[str, Any]:
    """Count the waits in the second step of a layer."""
    with one_rank(Platform.here()):
        tokens, width, g = context.choose((1024, 1024, 64), (8, 16, 4))
        layer = sparse_layer(
            router, context.device, width=width, active=width, g=g, backend=backend
        )
        generator = torch.Generator(context.device).manual_seed(1)
        x = torch.randn(
            tokens, 2, width, device=context.device, dtype=torch.bfloat16, generator=generator
        )
        ids = torch.randint(50, (2, tokens), device=context.device, generator=generator)

        def step(number: int) -> None:
            from megatron_sffn.nn.layer import end_step, set_weights_version

            set_weights_version(layer, number)
            y, _ = layer(x.detach().requires_grad_(), padding_mask=ids)
            y.float().square().mean().backward()
            end_step(layer)

        step(1)
        with waits_by_line(context) as waits:
            step(2)
    rows = [
        Row(router=router, backend=backend, line=line, count=number)
        for line, number in waits.most_common()
    ]
    if rows:
        append(rows, context.out / "syncs.csv")
    total = sum(waits.values())
    return {"waits": dict(waits), "print": [f"{router}: {total} waits a layer and microbatch"]}


@contextlib.contextmanager
def waits_by_line(context: Context) -> Iterator[Counter[str]]:
    """Count the waits of a block by the line that caused them."""
    lines: Counter[str] = Counter()

    def note(message: Any, *_: Any, **__: Any) -> None:
        if "synchronizing CUDA operation" in str(message):
            lines[calling_line()] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note  # restored by catch_warnings
        if context.dry:
            with _Waiting():
                yield lines
            return
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield lines
        finally:
            torch.cuda.set_sync_debug_mode("default")


class _Waiting(TorchDispatchMode):
    """Warn on a CPU as torch does on a GPU."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if would_wait(function, args, kwargs):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        return function(*args, **kwargs)


def calling_line() -> str:
    """The innermost line of the package, or else of Megatron or of torch's backward pass."""
    frame, other_lines = sys._getframe(1), []
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(PACKAGE):
            return f"{Path(name).relative_to(ROOT)}:{frame.f_lineno}"
        if "/megatron/" in name:
            other_lines.append(f"megatron/{name.rpartition('/megatron/')[2]}:{frame.f_lineno}")
        frame = frame.f_back  # type: ignore[assignment]
    return other_lines[0] if other_lines else "torch"
