"""One small case of a kernel, for tools that watch a process: `-m benchmarks.gpu.small NAME`.

Inputs: the name of a module with products, or `route_topk`. Outputs: nothing; its kernels have run.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.gpu import forms
from benchmarks.gpu.problem import Size, draw, sorted_pairs
from megatron_sffn.ops import route_topk

ROUTE = "route_topk"


def main() -> int:
    """Run the products of a module once, at a size that has tails in every direction."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.small", allow_abbrev=False)
    parser.add_argument("name")
    parser.add_argument("--cells", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=37)
    parser.add_argument("--width", type=int, default=48)
    parser.add_argument("--active", type=int, default=32)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.name == ROUTE:
        scores = torch.randn(5, 300, device=device)
        route_topk(scores, 7, backend="triton")
        return 0
    interpreted = device.type == "cpu" and forms.is_interpreted(args.name)
    size = Size(
        tokens=args.tokens,
        width=args.width,
        active=args.active,
        cells=args.cells,
        expansion=2,
        dtype=torch.float32 if interpreted else torch.bfloat16,
    )
    problem, module = draw(size, device), forms.modules()[args.name]
    pairs = sorted_pairs(problem.block_ids, size.num_blocks)
    ups = module.to_pairs(problem.x, problem.keys, pairs)
    module.to_rows(ups, problem.values, pairs, size.tokens)
    module.to_table(ups, problem.dy, pairs)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
