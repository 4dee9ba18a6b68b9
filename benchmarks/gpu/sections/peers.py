"""Check the peers of the benchmark against the oracle, at one real size, in fresh processes."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.blocks.problem import disagreement, reference, tolerance
from benchmarks.blocks.timing import step
from benchmarks.gpu.case import Case, Context, Failure
from benchmarks.gpu.problem import Size, draw
from benchmarks.machine import Platform, adapt, one_rank

PEERS = ("torch _grouped_mm", "transformers grouped_mm", "Megatron")
"""The beginnings of the names of `benchmarks.blocks.layers.peers`."""


def cases(context: Context) -> list[Case]:
    """One case per peer."""
    return [Case(name=name, run=functools.partial(compare, name, context)) for name in PEERS]


def compare(name: str, context: Context) -> dict[str, Any]:
    """Check the output and gradients of a peer against float64."""
    tokens, width, active, cells = context.choose((2048, 4096, 4096, 256), (16, 32, 32, 16))
    size = Size(
        tokens=tokens,
        width=width,
        active=active,
        cells=cells,
        expansion=4,
        dtype=torch.bfloat16,
        gated=False,
    )
    with peer_module(name, size, context) as (module, problem):
        y, dx = step(module, problem.x, problem.dy)
        error = disagreement({"y": y, "x": dx, **module.gradients()}, reference(problem))
    if not error <= tolerance(problem):
        raise Failure(f"it differs from float64 by {error:.1e}, more than {tolerance(problem):.0e}")
    return {"error": error}


@contextmanager
def peer_module(name: str, size: Size, context: Context) -> Iterator[tuple[Any, Any]]:
    """A peer for a problem, with process groups of size one for Megatron.

    Args:
        name: one of `PEERS`.
        size: size of the problem.
        context: context of the section.
    """
    adapt()
    from benchmarks.blocks import layers

    with one_rank(Platform.here()):
        (build,) = (make for full, make in layers.peers().items() if full.startswith(name))
        problem = draw(size, context.device)
        yield build(problem).to(context.device), problem
