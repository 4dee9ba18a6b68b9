"""The choice of the K best of B blocks: every backend against a stable sort."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import forms
from benchmarks.gpu.case import Case, Context, Failure
from megatron_sffn.ops import route_topk

KINDS = ("normal", "ties", "infinite", "equal", "zeros of both signs")


def cases(context: Context) -> list[Case]:
    """Small and large B, in fp32 and bf16; then NaN."""
    sizes = context.choose(
        ((256, 64, 4), (256, 1024, 128), (128, 8192, 512), (64, 131_072, 16_384), (7, 5000, 70)),
        ((5, 64, 4), (2, 5000, 70)),
    )
    found = []
    for backend in forms.backends():
        for tokens, blocks, active in sizes:
            run = functools.partial(compare, backend, tokens, blocks, active, context)
            found.append(Case(name=f"{backend}: {active} of {blocks}", run=run))
        found.append(Case(name=f"{backend}: NaN", run=functools.partial(nan, backend, context)))
    return found


def compare(
    backend: str, tokens: int, blocks: int, active: int, context: Context
) -> dict[str, Any]:
    """Ids of every kind of scores, in two dtypes."""
    for dtype in (torch.float32, torch.bfloat16):
        for kind in KINDS:
            scores = draw(kind, tokens, blocks, context.device).to(dtype)
            expected = route_topk(scores.float(), active, backend="naive")
            ids = route_topk(scores, active, backend=backend)
            wrong = (ids != expected).any(dim=1).double().mean().item()
            if wrong or ids.dtype != torch.int64:
                raise Failure(f"{wrong:.1%} of the rows differ for {kind} scores in {dtype}")
    return {}


def draw(kind: str, tokens: int, blocks: int, device: torch.device) -> Tensor:
    """`[T, B]` fp32 scores of a kind."""
    generator = torch.Generator(device).manual_seed(blocks)
    scores = torch.randn(tokens, blocks, device=device, generator=generator)
    match kind:
        case "ties":
            return (2 * scores).round()
        case "infinite":
            return scores.where(scores > -0.5, -torch.inf).where(scores < 1.5, torch.inf)
        case "equal":
            return torch.full_like(scores, -1.5)
        case "zeros of both signs":
            return torch.zeros_like(scores).copysign(scores)
    return scores


def nan(backend: str, context: Context) -> dict[str, Any]:
    """One NaN among many scores is refused."""
    scores = draw("normal", 8, 300, context.device)
    scores[3, 299] = torch.nan
    try:
        route_topk(scores, 5, backend=backend)
    except FloatingPointError:
        return {}
    raise Failure("one NaN of 2,400 scores passes without a word")
