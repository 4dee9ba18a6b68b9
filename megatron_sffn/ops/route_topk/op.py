"""`route_topk`: the K best of B blocks per token."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_sffn.errors import ConfigError
from megatron_sffn.ops import backends, device
from megatron_sffn.ops.compiled import kernels
from megatron_sffn.ops.route_topk import naive, threshold


@torch.no_grad()
def route_topk(scores: Tensor, num_active: int, *, backend: str = "auto") -> Tensor:
    """Choose the blocks with the largest scores.

    Args:
        scores: `[T, B]` real; not NaN; -inf comes last.
        num_active: K, from 1 to B.
        backend: `naive`, the oracle, a stable sort; `torch`, on any device; `cpu`, C++; `triton`,
            for a GPU and 32 or 16 bits; or `auto` for the fastest on the scores' device.

    Returns:
        `[T, K]` int64, ascending within a row; of equal scores the lowest index wins, so that
        every rank and every layout chooses alike.

    Raises:
        ConfigError: if there are less than K blocks, or a backend cannot compute on these scores.
        FloatingPointError: if a score is NaN.
    """
    backends.check(backend, scores)
    if num_active < 1 or num_active > scores.shape[1]:
        raise ConfigError(
            f"{num_active} of {scores.shape[1]} blocks cannot be chosen; choose 1 to all of them"
        )
    if selected := _select_and_check(scores, num_active, backend):
        ids, numbers = selected
        if numbers:
            return ids
    # NaN would be the largest of its row.
    if scores.shape[0] and scores.amax(dim=1).isnan().any():
        raise FloatingPointError(
            f"{int(scores.isnan().sum())} of {scores.numel()} block scores are NaN; "
            "the hidden states or keys that they come from have diverged"
        )
    select = naive.route_topk if backend == "naive" else threshold.route_topk
    return select(scores, num_active)


def _select_and_check(scores: Tensor, num_active: int, backend: str) -> tuple[Tensor, bool] | None:
    """`[T, K]` ids and whether all scores are numbers, of a kernel that finds both; else None."""
    selected: tuple[Tensor, bool]
    if backend == "triton":
        ids: Tensor = backends.triton_for(__package__, scores).route_topk(scores, num_active)
        return ids, not bool(scores.isnan().any())
    # On a GPU not yet triton: its tests there have never run.
    compiled = kernels() if backend in ("auto", "cpu") and not device.is_gpu(scores) else None
    if compiled is None:
        return None
    wide = torch.promote_types(scores.dtype, torch.float32)
    selected = compiled.route_topk(scores.to(wide).contiguous(), num_active)
    return selected
