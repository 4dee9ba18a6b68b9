"""Time the three products of every module that has them, over a dense product of equal compute.

Outputs: products.csv, and from it the values that `SECONDS_PER_BYTE` and `FLOPS` of
ops/block_ffn/triton.py should have on this card.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.blocks.problem import Problem
from benchmarks.gpu import forms
from benchmarks.gpu.case import Case, Context, NotHere
from benchmarks.gpu.clock import measure
from benchmarks.gpu.problem import Size, draw, sorted_pairs
from benchmarks.gpu.rows import Row, row_of, rows_of_run, write
from megatron_sffn.ops.block_ffn.pairs import Sorted

FILE = "products.csv"

GROUPED, MASKED = "triton_grouped", "triton_masked"
"""The two forms of the Triton products; `SECONDS_PER_BYTE` decides between them."""


def cases(context: Context) -> list[Case]:
    """Every size with all modules; then the constants."""
    modules = [name for name in forms.modules() if name != "triton"]  # it only chooses a form
    all_cases = []
    for g, expansion in context.choose(
        ((64, 4), (256, 4), (1024, 4), (16, 4), (1, 4), (64, 16), (256, 16), (16, 16), (1, 16)),
        ((8, 2),),
    ):
        for name in modules:
            if forms.too_slow(name, g, context):
                continue
            size = size_of(g, expansion, forms.dtype_for(name, context), context)
            run = functools.partial(compare, name, size, context)
            all_cases.append(Case(name=f"{name}: {size.name}", run=run))
    return [*all_cases, Case(name="constants", run=lambda: constants(rows_of_run(FILE, context)))]


def size_of(g: int, expansion: int, dtype: torch.dtype, context: Context) -> Size:
    """The size of a product with T = 16,384, D = 4,096, k = 16,384."""
    tokens, width, active = context.choose((16_384, 4096, 16_384), (7, 16, 16))
    return Size(
        tokens=tokens,
        width=width,
        active=active,
        cells=g,
        expansion=expansion,
        dtype=dtype,
        gated=False,
    )


@functools.lru_cache(maxsize=1)
def cached_problem(size: Size, device: torch.device) -> tuple[Problem, Sorted, Tensor]:
    """A problem, its pairs, and coefficients `[P, G]`, cached for the next module."""
    problem = draw(size, device)
    pairs = sorted_pairs(problem.block_ids, size.num_blocks)
    coefficients = torch.empty(len(pairs.rows), size.cells, dtype=size.dtype, device=device)
    return problem, pairs, coefficients.normal_()


@functools.lru_cache(maxsize=4)
def dense_ms(size: Size, context: Context) -> float:
    """Milliseconds of `[T, D] × [D, k]`: the unit of a product."""
    x = torch.ones(size.tokens, size.width, dtype=size.dtype, device=context.device)
    table = torch.ones(size.active, size.width, dtype=size.dtype, device=context.device)
    return measure(lambda: x @ table.T, context).median


def compare(name: str, size: Size, context: Context) -> dict[str, Any]:
    """Time the three products of one module at one size; if one fails, the case fails."""
    problem, pairs, coefficients = cached_problem(size, context.device)
    module, unit = forms.modules()[name], dense_ms(size, context)
    calls: dict[str, Callable[[], Any]] = {
        "to_pairs": lambda: module.to_pairs(problem.x, problem.keys, pairs),
        "to_rows": lambda: module.to_rows(coefficients, problem.values, pairs, size.tokens),
        "to_table": lambda: module.to_table(coefficients, problem.dy, pairs),
    }
    rows = [
        row_of(size, measure(call, context), contender=name, what=product, unit=unit)
        for product, call in calls.items()
    ]
    write(rows, FILE, context)
    return {row.what: {"ms": row.ms, "ratio": row.ratio, "spread": row.spread} for row in rows}


def constants(rows: list[Row]) -> dict[str, Any]:
    """Estimate `FLOPS` and `SECONDS_PER_BYTE` from the measured rows.

    A masked product does 2·M·T·D operations: the fastest one gives `FLOPS`. A grouped product does
    2·P·N·D operations and moves P·D numbers: the rest of its time over these bytes gives its entry
    of `SECONDS_PER_BYTE`.
    """
    masked = [row for row in rows if row.contender == MASKED]
    grouped = [row for row in rows if row.contender == GROUPED and row.block_size > 1]
    if not masked or not grouped:
        raise NotHere("neither form was timed at these sizes")
    operations = max(_operations(row) * row.expansion / row.ms * 1e3 for row in masked)
    moves: dict[str, float] = {}
    for product in forms.PRODUCTS:
        seconds = [
            (row.ms / 1e3 - _operations(row) / operations) / _moved(row)
            for row in grouped
            if row.what == product
        ]
        # The median over the sizes: at large g the excess is the noise of the product.
        moves[product] = max(sorted(seconds)[len(seconds) // 2], 0.0)
    rates = ", ".join(
        f'"{name}": 1 / {1 / rate:.2g}' if rate else f'"{name}": 0.0'
        for name, rate in moves.items()
    )
    words = f"triton.py: FLOPS[bf16] = {operations:.3g}; SECONDS_PER_BYTE = {{{rates}}}"
    return {"operations_per_second": operations, "seconds_per_byte": moves, "print": [words]}


def _operations(row: Row) -> int:
    return 2 * row.tokens * row.active_cells * row.hidden_size


def _moved(row: Row) -> float:
    """Bytes of one row per pair."""
    item = torch.empty(0, dtype=getattr(torch, row.dtype)).element_size()
    return row.tokens * row.active_cells / row.block_size * row.hidden_size * item
