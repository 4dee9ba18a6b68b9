"""Forward and backward of a layer with given routing: every backend over a dense FFN of k cells.

Outputs: layers.csv, and a table with a line per g and E and a column per backend.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from benchmarks.blocks import layers
from benchmarks.blocks.problem import Problem
from benchmarks.blocks.timing import step
from benchmarks.gpu import forms
from benchmarks.gpu.case import Case, Context
from benchmarks.gpu.clock import measure
from benchmarks.gpu.problem import Size, draw
from benchmarks.gpu.rows import row_of, rows_of_run, write

FILE = "layers.csv"
WHAT = "forward + backward"
SHAPES = ((1024, 4), (256, 4), (64, 4), (16, 4), (1, 4), (1024, 16), (256, 16), (64, 16), (16, 16))
"""The g and E to time, the cheaper E first; g = 1 at E = 16 would take E times the dense time."""


def cases(context: Context) -> list[Case]:
    """All backends at D = 4,096, then at D = 1,024, with a table after each."""
    all_cases = []
    for width in context.choose((4096, 1024), (16,)):
        for g, expansion in context.choose(SHAPES, ((8, 2),)):
            for backend in forms.backends():
                if forms.too_slow(backend, g, context):
                    continue
                size = size_of(width, g, expansion, forms.dtype_for(backend, context), context)
                run = functools.partial(compare, backend, size, context)
                all_cases.append(Case(name=f"{backend}: {size.name}", run=run))
        all_cases.append(
            Case(name=f"table D={width}", run=functools.partial(table, width, context))
        )
    return all_cases


def size_of(
    width: int, g: int, expansion: int, dtype: torch.dtype, context: Context, *, gated: bool = True
) -> Size:
    """The size with T = 16,384 and k = 4·D."""
    return Size(
        tokens=context.choose(16_384, 7),
        width=width,
        active=context.choose(4 * width, 16),
        cells=g,
        expansion=expansion,
        dtype=dtype,
        gated=gated,
    )


@functools.lru_cache(maxsize=1)
def cached_problem(size: Size, device: torch.device) -> Problem:
    """The problem of a size, cached for the next backend."""
    return draw(size, device)


def compare(backend: str, size: Size, context: Context) -> dict[str, Any]:
    """Time one backend at one size."""
    problem = cached_problem(size, context.device)
    return time_module(layers.BlockFFN(problem, backend), problem, size, context, contender=backend)


def time_module(
    module: Any, problem: Problem, size: Size, context: Context, *, contender: str
) -> dict[str, Any]:
    """Time forward and backward of a module, note its row, and free its gradients."""

    def run() -> None:
        step(module, problem.x, problem.dy)
        module.zero_grad(set_to_none=True)

    unit = dense_ms(size.tokens, size.width, size.active, size.dtype, context)
    row = row_of(size, measure(run, context), contender=contender, what=WHAT, unit=unit)
    write([row], FILE, context)
    return {"ms": row.ms, "ratio": row.ratio, "spread": row.spread, "peak_bytes": row.peak_bytes}


@functools.lru_cache(maxsize=4)
def dense_ms(tokens: int, width: int, active: int, dtype: torch.dtype, context: Context) -> float:
    """Milliseconds of forward and backward of the dense FFN: the unit."""
    size = Size(tokens=tokens, width=width, active=active, cells=active, expansion=1, dtype=dtype)
    problem = draw(size, context.device)
    module = layers.Dense(problem)

    def run() -> None:
        step(module, problem.x, problem.dy)
        module.zero_grad(set_to_none=True)

    return measure(run, context, seconds=0.5).median


def table(width: int, context: Context) -> dict[str, Any]:
    """The ratios of all rows of this section at one D, as a table."""
    rows = [row for row in rows_of_run(FILE, context) if row.hidden_size == width]
    names = list(dict.fromkeys(row.contender for row in rows))
    ratios = {(row.block_size, row.expansion, row.contender): row.ratio for row in rows}
    sizes = list(dict.fromkeys((row.block_size, row.expansion) for row in rows))
    lines = [f"{WHAT} over dense, D = {width}", "   g  E " + " ".join(f"{n:>9}" for n in names)]
    for g, expansion in sizes:
        cells = (ratios.get((g, expansion, name)) for name in names)
        numbers = " ".join(f"{'-' if ratio is None else f'{ratio:.2f}':>9}" for ratio in cells)
        lines.append(f"{g:4} {expansion:2} {numbers}")
    return {"print": lines}
