"""Times forward and backward of sparse layers with their routers, to show the cost of routing."""

from __future__ import annotations

import functools
from typing import Any

import torch

from benchmarks.gpu.case import Case, Context
from benchmarks.gpu.clock import measure
from benchmarks.gpu.rows import row_of, write
from benchmarks.gpu.sections.layers import FILE, WHAT, dense_ms, size_of, table
from benchmarks.gpu.sparse_layer import sparse_layer
from benchmarks.machine import Platform, adapt, one_rank

ROUTERS = ("avg-k", "switch", "vanilla-m")


def cases(context: Context) -> list[Case]:
    """Three routers at D = 4,096, then at D = 1,024."""
    adapt()
    all_cases = []
    for width in context.choose((4096, 1024), (16,)):
        for g, expansion in context.choose(((64, 4), (256, 16), (1024, 4), (16, 4)), ((8, 2),)):
            for router in ROUTERS[: context.choose(3, 1)]:
                run = functools.partial(compare, router, width, g, expansion, context)
                all_cases.append(Case(name=f"{router}: g={g} E={expansion} D={width}", run=run))
        all_cases.append(
            Case(name=f"table D={width}", run=functools.partial(table, width, context))
        )
    return all_cases


def compare(router: str, width: int, g: int, expansion: int, context: Context) -> dict[str, Any]:
    """Time one router at one size."""
    size = size_of(width, g, expansion, torch.bfloat16, context)
    with one_rank(Platform.here()):
        layer = sparse_layer(
            router, context.device, width=width, active=size.active, g=g, expansion=expansion
        )
        shape = (size.tokens, 1, width)
        x = torch.randn(shape, device=context.device, dtype=size.dtype)
        dy = torch.randn(shape, device=context.device, dtype=size.dtype)

        def run() -> None:
            layer(x.detach().requires_grad_())[0].backward(dy)
            layer.zero_grad(set_to_none=True)

        unit = dense_ms(size.tokens, width, size.active, size.dtype, context)
        contender = f"{router}, routed"
        row = row_of(size, measure(run, context), contender=contender, what=WHAT, unit=unit)
    write([row], FILE, context)
    return {"ms": row.ms, "ratio": row.ratio, "peak_bytes": row.peak_bytes}
