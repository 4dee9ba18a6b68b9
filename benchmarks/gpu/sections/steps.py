"""Whole training steps at real sizes: dense, ours, and Megatron's experts behind our router."""

from __future__ import annotations

import functools
from argparse import Namespace
from typing import Any

from benchmarks import steps
from benchmarks.gpu.case import Case, Context, Failure
from megatron_sffn.utils.errors import ConfigError


def cases(context: Context) -> list[Case]:
    """The dense model first, because it is the unit."""
    dense: dict[str, float] = {}
    kinds = [("dense", 0, 1), ("ours", 256, 16), ("ours", 64, 4), ("megatron", 256, 16)]
    kinds += [("ours", 1024, 16), ("ours", 16, 4)]
    if context.dry:
        kinds = [("dense", 0, 1), ("ours", 16, 2)]
    return [
        Case(
            name=f"{backend} g={g} E={expansion}",
            run=functools.partial(run, backend, g, expansion, dense, context),
        )
        for backend, g, expansion in kinds
    ]


def run(
    backend: str, g: int, expansion: int, dense: dict[str, float], context: Context
) -> dict[str, Any]:
    """The median step of one run over the dense model's; for `dense` its milliseconds."""
    tokens, layers, width = context.choose((16_384, 4, 2048), (256, 1, 32))
    step = steps.Step(backend=backend, block_size=g, expansion=expansion, tokens=tokens)
    sizes = Namespace(num_layers=layers, hidden_size=width, train_iters=context.choose(12, 2))
    try:
        ms = steps.milliseconds(step, sizes, extra=("--bf16",))
    except ConfigError as error:  # which is how that command says that a run failed
        raise Failure(str(error)) from error
    if backend == "dense":
        dense["ms"] = ms
    ratio = ms / dense["ms"] if dense else None
    words = f"step, {backend} g={g} E={expansion}, {tokens} tokens, D = {width}: {ms:.1f} ms"
    if ratio is not None:
        words += f", {ratio:.2f} of dense"
    return {"ms": ms, "ratio": ratio, "print": [words]}
