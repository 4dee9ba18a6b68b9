"""Time the peers' forward and backward over the same dense FFN, in fresh processes."""

from __future__ import annotations

import functools
from typing import Any

import torch

from benchmarks.blocks.timing import COPIES
from benchmarks.gpu.case import Case, Context, NotHere
from benchmarks.gpu.sections.layers import size_of, time_module
from benchmarks.gpu.sections.peers import PEERS, peer_module


def cases(context: Context) -> list[Case]:
    """Each peer at all sizes of one D."""
    return [
        Case(name=f"{name} D={width}", run=functools.partial(compare, name, width, context))
        for width in context.choose((4096, 1024), (16,))
        for name in PEERS[context.choose(0, 2) :]  # the section `peers` has started all of them
    ]


def compare(name: str, width: int, context: Context) -> dict[str, Any]:
    """Time one peer at every size for which its copies of tokens fit in memory."""
    values: dict[str, Any] = {}
    ratios: list[str] = []
    for g, expansion in context.choose(((1024, 4), (256, 4), (64, 4), (256, 16)), ((8, 2),)):
        size = size_of(width, g, expansion, torch.bfloat16, context, gated=False)
        copies = COPIES * size.tokens * size.num_active * width * size.dtype.itemsize
        if not context.dry and copies > torch.cuda.mem_get_info()[0]:
            values[size.name] = "its copies of tokens would need more memory than is free"
            continue
        if context.left < 0:
            values[size.name] = "its time was up"
            continue
        try:
            with peer_module(name, size, context) as (module, problem):
                values[size.name] = time_module(module, problem, size, context, contender=name)
            ratios.append(f"g={g} E={expansion} {values[size.name]['ratio']:.2f}")
        except torch.OutOfMemoryError as error:
            values[size.name] = str(error)[:200]
    if not ratios:
        raise NotHere(f"no size could be timed: {values}")
    return {**values, "print": [f"{name}, D = {width}: {', '.join(ratios)}"]}
