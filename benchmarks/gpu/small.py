"""Run one kernel once, for tools that watch a process: `python -m benchmarks.gpu.small NAME`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from unittest import mock

import torch

from benchmarks.gpu import forms
from benchmarks.gpu.problem import LOADS, Size, draw, sorted_pairs
from megatron_sffn.ops import route_topk
from megatron_sffn.ops.activation import Activation
from megatron_sffn.ops.block_ffn import triton_fused, triton_table

ROUTE = "route_topk"

CHUNKED = ("--load", "skewed", "--chunk", "16")
"""Flags with which a small case splits a block into chunks of pairs."""


def targets() -> list[str]:
    """All names with Triton kernels: modules, the fused products, and `route_topk`."""
    modules = [name for name in forms.modules() if name.startswith("triton_")]
    return [*modules, forms.FUSED, ROUTE]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the kernels of a target once, at a size that fills no tile in any direction."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.small", allow_abbrev=False)
    parser.add_argument("name")
    parser.add_argument("--cells", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=197)
    parser.add_argument("--width", type=int, default=48)
    parser.add_argument("--active", type=int, default=32)
    parser.add_argument("--load", choices=LOADS, default="uniform")
    parser.add_argument("--chunk", type=int, default=triton_table.CHUNK)
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.name == ROUTE:
        route_topk(torch.randn(args.tokens, 300, device=device), 7, backend="triton")
    else:
        with mock.patch.object(triton_table, "CHUNK", args.chunk):
            run_products(args, device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 0


def run_products(args: argparse.Namespace, device: torch.device) -> None:
    """Run the three products of a module, or the fused ones with a plain and a gated activation."""
    interpreted = device.type == "cpu" and forms.is_interpreted(args.name)
    for activation in (Activation.GELU, Activation.SWIGLU):
        size = Size(
            tokens=args.tokens,
            width=args.width,
            active=args.active,
            cells=args.cells,
            expansion=2,
            dtype=torch.float32 if interpreted else torch.bfloat16,
            load=args.load,
            activation=activation,
        )
        problem = draw(size, device)
        pairs = sorted_pairs(problem.block_ids, size.num_blocks)
        if args.name != forms.FUSED:
            module = forms.modules()[args.name]
            ups = module.to_pairs(problem.x, problem.keys, pairs)
            module.to_rows(ups, problem.values, pairs, size.tokens)
            module.to_table(ups, problem.dy, pairs)
            return
        gates = torch.rand(len(pairs.rows), device=device)
        ups, _ = triton_fused.up_activated(problem.x, problem.keys, pairs, gates, activation)
        triton_fused.down_backward_activated(
            problem.dy, problem.values, pairs, ups, gates, activation
        )


if __name__ == "__main__":
    raise SystemExit(main())
