"""Exact top-K of B block scores per token, ties to the lowest index."""

from megatron_sffn.ops.route_topk.op import route_topk

__all__ = ["route_topk"]
