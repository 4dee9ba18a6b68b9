"""Check `route_topk`: every backend against a stable sort."""

from __future__ import annotations

import contextlib
import functools
import os
from typing import Any
from unittest import mock

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
        ((3, 64, 4), (1, 5000, 70)),
    )
    all_cases = []
    for backend in forms.backends():
        for tokens, blocks, active in sizes:
            run = functools.partial(compare, backend, tokens, blocks, active, context)
            all_cases.append(Case(name=f"{backend}: {active} of {blocks}", run=run))
        all_cases.append(Case(name=f"{backend}: NaN", run=functools.partial(nan, backend, context)))
    return all_cases


def compare(
    backend: str, tokens: int, blocks: int, active: int, context: Context
) -> dict[str, Any]:
    """Compare the ids for every kind of scores, in two dtypes."""
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
    """Check that a row with NaN gets distinct ids in range, and that other rows stay correct."""
    scores = draw("normal", 8, 300, context.device)
    expected = route_topk(scores, 5, backend="naive")
    scores[3, 299], scores[5] = torch.nan, torch.nan
    ids = route_topk(scores, 5, backend=backend)
    for row in (3, 5):
        row_ids = ids[row].tolist()
        if len(set(row_ids)) < 5 or min(row_ids) < 0 or max(row_ids) >= 300:
            raise Failure(f"a row with NaN gets ids {row_ids}, not 5 distinct ones below 300")
    other_rows = [row for row in range(8) if row not in (3, 5)]
    if not torch.equal(ids[other_rows], expected[other_rows]):
        raise Failure("NaN in one row changes the ids of others")
    with mock.patch.dict(os.environ, SFFN_CHECK="1"), contextlib.suppress(FloatingPointError):
        route_topk(scores, 5, backend=backend)
        raise Failure("NaN raises no error although SFFN_CHECK=1 is set")
    return {}
