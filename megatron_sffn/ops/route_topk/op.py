"""`route_topk`: the ids of the K largest of B scores per token, and the choice of the backend."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from megatron_sffn.ops import backends, device
from megatron_sffn.ops.compiled import kernels
from megatron_sffn.ops.route_topk import naive, threshold
from megatron_sffn.utils.errors import ConfigError


@torch.no_grad()
def route_topk(scores: Tensor, num_active: int, *, backend: str = "auto") -> Tensor:
    """Choose the blocks with the largest scores. The host does not wait for a GPU.

    Args:
        scores: `[T, B]`, of any floating dtype, without NaN; -inf comes last.
        num_active: K, from 1 to B.
        backend: `naive`, the oracle, a stable sort; `torch`, on any device; `cpu`, C++; `triton`,
            for a GPU and 32 or 16 bits; or `auto` for the fastest on the scores' device.

    Returns:
        `[T, K]` int64, ascending within a row. Of equal scores the lowest index wins, so that all
        ranks and layouts choose the same blocks. A row with NaN gets K distinct ids in [0, B), so
        that no later index is out of range; the router itself reports scores that are NaN.

    Raises:
        ConfigError: if there are fewer than K blocks, or the backend cannot compute on these
            scores.
        FloatingPointError: if a score is NaN and `SFFN_CHECK=1` is set.
    """
    backends.check(backend, scores)
    if num_active < 1 or num_active > scores.shape[1]:
        raise ConfigError(
            f"{num_active} of {scores.shape[1]} blocks cannot be chosen; choose 1 to all of them"
        )
    if os.environ.get("SFFN_CHECK") == "1":
        _check_numbers(scores)
    if backend == "naive":
        return naive.route_topk(scores, num_active)
    if backend == "triton":
        ids: Tensor = backends.triton_for(_triton, scores).route_topk(scores, num_active)
        return ids
    # On a GPU `auto` is plain torch, not yet triton, whose tests have never run on a GPU.
    compiled = kernels() if backend in ("auto", "cpu") and not device.is_gpu(scores) else None
    if compiled is not None:
        wide = torch.promote_types(scores.dtype, torch.float32)
        ids, has_no_nan = compiled.route_topk(scores.to(wide).contiguous(), num_active)
        # The kernel writes no ids into a row with NaN; then plain torch computes all rows.
        if has_no_nan:
            return ids
    return threshold.route_topk(scores, num_active)


def _check_numbers(scores: Tensor) -> None:
    """Raise `FloatingPointError` for a NaN; the host waits for the device."""
    if num_nan := int(scores.isnan().sum()):
        raise FloatingPointError(
            f"{num_nan} of {scores.numel()} block scores are NaN; the hidden states or keys that "
            "they come from have diverged"
        )


def _triton() -> Any:
    """The Triton selection, whose import needs the package triton."""
    from megatron_sffn.ops.route_topk import triton

    return triton
