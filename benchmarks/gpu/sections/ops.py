"""Check the products and `block_ffn` of every backend against the oracle, at small and real sizes.

A case passes if every output and gradient is within the tolerance of its dtype from float64, first
with all uninitialised memory filled with NaN, then without, and if two runs give the same bits.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.blocks import layers
from benchmarks.blocks.problem import Problem, disagreement, reference, tolerance
from benchmarks.blocks.timing import step
from benchmarks.gpu import forms
from benchmarks.gpu.case import Case, Context, Failure
from benchmarks.gpu.problem import Size, draw


def cases(context: Context) -> list[Case]:
    """The kernels' own cases, then real sizes of every backend, then a large one."""
    return [*kernel_cases(context), *size_cases(context), *large_cases(context)]


def kernel_cases(context: Context) -> Iterator[Case]:
    """The cases of tests/ops/triton_cases.py: each compares all products with float64."""
    tests = importlib.import_module("tests.ops.triton_cases")
    tolerances: dict[str, float] = tests.TOLERANCES

    def run(case: str, size: str, dtype: str) -> dict[str, Any]:
        errors = tests.errors(case, size, dtype, context.device.type)
        for name, error in errors.items():
            if not error < tolerances[dtype]:  # NaN is a failure
                raise Failure(f"{name} is {error:.2e} off, more than {tolerances[dtype]:.0e}")
        return {"worst": max(errors.values(), default=0.0)}

    all_names = list(itertools.product(tests.CASES, tests.SIZES, tests.DTYPES))
    dry_names = [("one row", "7x16", "fp32")]
    for names in context.choose(all_names, dry_names):
        yield Case(name=f"kernels: {', '.join(names)}", run=functools.partial(run, *names))


def size_cases(context: Context) -> Iterator[Case]:
    """Real sizes: all g and E, rows that are and are not multiples of 16, uneven loads."""
    width, active = context.choose((4096, 4096), (16, 8))
    rows = context.choose((2048, 2051), (16, 7))
    cells = context.choose((256, 64, 1024, 16, 1), (8, 1))
    shapes = [(rows[1], g, e, "uniform") for e in context.choose((4, 16), (4,)) for g in cells]
    shapes += [(rows[0], cells[0], 4, "uniform")]
    shapes += [
        (rows[1], g, 4, load) for load in ("skewed", "empty") for g in context.choose(cells, (8,))
    ]
    for tokens, g, expansion, load in shapes:
        for backend in forms.backends():
            if backend == "auto" or forms.too_slow(backend, g, context):
                continue  # auto chooses one of the other backends
            size = Size(
                tokens=tokens,
                width=width,
                active=active,
                cells=g,
                expansion=expansion,
                dtype=forms.dtype_for(backend, context),
                load=load,
            )
            run = functools.partial(compare, backend, size, context)
            yield Case(name=f"{backend}: {size.name}", run=run)


def large_cases(context: Context) -> Iterator[Case]:
    """More than 2^31 coefficients, which would overflow 32-bit indices."""
    tokens, active, width, g = context.choose((131_077, 16_384, 256, 64), (7, 16, 16, 16))
    for backend in forms.backends():
        if backend == "auto" or forms.too_slow(backend, g, context):
            continue
        dtype = forms.dtype_for(backend, context)
        size = Size(
            tokens=tokens,
            width=width,
            active=active,
            cells=g,
            expansion=2,
            dtype=dtype,
            gated=False,
        )
        run = functools.partial(compare, backend, size, context)
        yield Case(name=f"{backend}, P·N > 2^31: {size.name}", run=run)


def compare(backend: str, size: Size, context: Context) -> dict[str, Any]:
    """Check one backend at one size in three runs: once filled with NaN, and twice without."""
    problem, expected = problem_of(size, context.device)
    module = layers.BlockFFN(problem, backend)
    error = 0.0
    for fill in (True, False):
        results = run_step(module, problem, fill)
        error = max(error, disagreement(results, expected))
        if not error <= tolerance(problem):
            kind = "with NaN in uninitialised memory, " if fill else ""
            raise Failure(
                f"{kind}it differs from float64 by {error:.1e}, more than {tolerance(problem):.0e}"
            )
    if context.dry and forms.is_interpreted(backend):
        return {"error": error}  # the interpreter is slow, and has one order only
    repeated = run_step(module, problem, False)
    different = [name for name in results if not torch.equal(results[name], repeated[name])]
    if different:
        raise Failure(f"{', '.join(different)} have other bits when computed again")
    return {"error": error}


@functools.lru_cache(maxsize=1)
def problem_of(size: Size, device: torch.device) -> tuple[Problem, dict[str, Tensor]]:
    """A problem and its float64 result, cached for the next backend at the same size."""
    problem = draw(size, device)
    return problem, reference(problem)


def run_step(module: layers.BlockFFN, problem: Problem, fill: bool) -> dict[str, Tensor]:
    """Forward and backward; returns the output and all gradients.

    Args:
        module: one of ours.
        problem: its inputs.
        fill: True to fill `torch.empty` with NaN, which reveals memory that is never written.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(fill, warn_only=True)
        try:
            y, dx = step(module, problem.x, problem.dy)
        finally:
            torch.use_deterministic_algorithms(False)
    tensors = {"y": y, "x": dx, **module.gradients()}
    module.zero_grad(set_to_none=True)
    return tensors
