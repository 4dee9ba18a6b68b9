"""Descriptors of blocks for Avg-K: one vector `[D]` per block, from its keys or from its tokens.

Inputs: this rank's keys `[B / ep, G / etp, D]` (gate keys, for a gated activation). Outputs:
descriptors `[B, D]`, the same on every rank.

The plain mean is Avg-K (Liu et al. 2023, arXiv 2305.13999). The paper leaves better aggregators
open; all other descriptors are ours:

- `max-norm`: the block's longest key;
- `norm-weighted`: the mean weighted by the keys' lengths;
- `learned`: a weighted mean, the weights a softmax of a parameter per cell, equal at first;
- `subset`: the mean of some cells of each block, drawn once;
- `ema`: a moving average of the tokens that chose the block; the mean key until the first step in
  which a token chose it.
"""

from __future__ import annotations

from typing import Any, ClassVar, override

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_sffn.nn.routers.base import Router, score_dtype
from megatron_sffn.nn.saved_bytes import FP32, INT64, LayerCall
from megatron_sffn.ops import device
from megatron_sffn.utils.hashing import hashed_subsets, seed_of


class Mean(torch.nn.Module):
    """The mean key.

    Args:
        router: the router whose blocks are described.
        group: process group of all ranks that hold tokens of the layer.
        subset_cells: cells of a block that `subset` averages; None for a quarter of them.
        decay: share of the former average that `ema` keeps in a step.
    """

    of_weights_alone: ClassVar[bool] = True
    """True if the descriptor depends only on weights, so that it changes only with them."""

    def __init__(
        self, router: Router, *, group: Any, subset_cells: int | None = None, decay: float = 0.0
    ) -> None:
        super().__init__()
        self.expert_grid, self.group = router.expert_grid, group
        self.subset_cells, self.decay = subset_cells, decay
        self.seed = router.sffn.seed

    def forward(self, keys: Tensor, layer_number: int | None) -> Tensor:
        """From keys `[B / ep, G / etp, D]` to descriptors `[B, D]`, fp32 at least."""
        sums = keys.sum(dim=1, dtype=score_dtype(keys))
        return self.expert_grid.sum_over_cells(sums) / self.expert_grid.block_size

    @classmethod
    def saved_bytes(cls, call: LayerCall) -> int:
        """Bytes kept for the backward pass beside the descriptors `[B, D]` themselves."""
        return 0

    def observe(self, x: Tensor, block_ids: Tensor) -> None:
        """Take note of which tokens `[T, D]` chose which blocks `[T, K]` in training."""

    def end_step(self) -> None:
        """Called on all ranks when a training step is over."""


class Weighted(Mean):
    """Base of the weighted means."""

    fp32_key_copies: ClassVar[int] = 0
    """Copies in fp32 that the backward pass keeps of half-precision keys."""

    @override
    @classmethod
    def saved_bytes(cls, call: LayerCall) -> int:
        copies = cls.fp32_key_copies if call.layout.half_precision else 0
        local_cells = call.sffn.num_cells // call.layout.expert_ranks
        # A weight and the copies for each cell; for each block the weighted sum of keys and the
        # sum of weights, before and after the clamp.
        per_block = call.hidden_size + 2
        return FP32 * (
            local_cells * (1 + copies * call.hidden_size) + call.sffn.num_blocks * per_block
        )

    def _weighted(self, keys: Tensor, weights: Tensor) -> Tensor:
        """The mean of keys by weights `[B / ep, G / etp]`, which are at least 0."""
        keys = keys.to(score_dtype(keys))
        sums = torch.einsum("bg,bgd->bd", weights, keys)
        # One gather for both: sums of weighted keys, and sums of weights in the last column.
        sums = torch.cat((sums, weights.sum(dim=1, keepdim=True)), dim=1)
        sums = self.expert_grid.sum_over_cells(sums)
        return sums[:, :-1] / sums[:, -1:].clamp(min=torch.finfo(sums.dtype).tiny)


class NormWeighted(Weighted):
    """The mean of keys weighted by their lengths."""

    fp32_key_copies = 2

    @override
    def forward(self, keys: Tensor, layer_number: int | None) -> Tensor:
        return self._weighted(keys, keys.to(score_dtype(keys)).norm(dim=2))


class MaxNorm(Mean):
    """The longest key of a block; the first one of equally long keys."""

    @override
    @classmethod
    def saved_bytes(cls, call: LayerCall) -> int:
        # Block and cell of the longest key, twice: on a rank, then over ranks.
        return 4 * INT64 * call.sffn.num_blocks

    @override
    def forward(self, keys: Tensor, layer_number: int | None) -> Tensor:
        longest = self._longest(keys.to(score_dtype(keys)))
        return self._longest(self.expert_grid.gather_blocks(longest))

    @staticmethod
    def _longest(keys: Tensor) -> Tensor:
        """The longest key of each block, from `[blocks, cells, D]` to `[blocks, D]`."""
        longest = keys.detach().norm(dim=2).argmax(dim=1)
        return keys[torch.arange(len(keys), device=keys.device), longest]


def subset_size(block_size: int, subset_cells: int | None) -> int:
    """Cells of a block that are averaged; `subset_cells` is `--sffn-descriptor-cells`."""
    return min(subset_cells or max(1, block_size // 4), block_size)


def subsets_of_cells(
    block_ids: Tensor,
    block_size: int,
    subset_cells: int | None,
    *,
    seed: int,
    layer_number: int | None,
) -> Tensor:
    """`[B, cells]` the averaged cells of blocks `[B]`, counted from 0 within each block."""
    return hashed_subsets(
        block_ids,
        size=block_size,
        count=subset_size(block_size, subset_cells),
        key=seed_of(seed, layer_number, "subset"),
    )


class Subset(Weighted):
    """The mean of a fixed random subset of a block's cells."""

    _weights: tuple[int | None, Tensor] | None = None

    @override
    def forward(self, keys: Tensor, layer_number: int | None) -> Tensor:
        if self._weights is None or self._weights[0] != layer_number:
            self._weights = (layer_number, self._draw_weights(keys, layer_number))
        return self._weighted(keys, self._weights[1])

    @torch.no_grad()
    def _draw_weights(self, keys: Tensor, layer_number: int | None) -> Tensor:
        """`[B / ep, G / etp]`: 1 for a cell of the subset, else 0."""
        grid = self.expert_grid
        cells = subsets_of_cells(
            torch.arange(grid.num_blocks, device=keys.device),
            grid.block_size,
            self.subset_cells,
            seed=self.seed,
            layer_number=layer_number,
        )
        weights = keys.new_zeros(grid.num_blocks, grid.block_size, dtype=score_dtype(keys))
        return grid.local_cells(weights.scatter_(1, cells, 1.0))


class Learned(Weighted):
    """A weighted mean; the weights are the softmax of a parameter per cell."""

    fp32_key_copies = 1

    def __init__(self, router: Router, **arguments: Any) -> None:
        super().__init__(router, **arguments)
        self.weight = router.new_weight("descriptor.weight")

    @override
    def forward(self, keys: Tensor, layer_number: int | None) -> Tensor:
        shares = self.weight.to(score_dtype(keys)).softmax(dim=1)
        return self._weighted(keys, self.expert_grid.local_cells(shares))


class MovingAverage(Mean):
    """A moving average of the tokens that chose a block, updated once per step."""

    of_weights_alone = False
    all_started = False
    """True if all blocks have an average; the host asks the device once per step."""
    average: Tensor
    started: Tensor
    sums: Tensor
    counts: Tensor

    def __init__(self, router: Router, **arguments: Any) -> None:
        super().__init__(router, **arguments)
        blocks = router.sffn.num_blocks
        width = router.sffn.router_width(router.config.hidden_size)
        zeros = torch.zeros(blocks, width, dtype=torch.float32, device=device.current())
        self.register_buffer("average", zeros.clone())
        self.register_buffer("started", zeros.new_zeros(blocks, 1))
        self.register_buffer("sums", zeros.clone(), persistent=False)
        self.register_buffer("counts", zeros.new_zeros(blocks), persistent=False)

    def _maintain_float32_expert_bias(self) -> None:
        """Megatron's hook: keep these buffers in fp32 when a half-precision model casts buffers."""
        for name, buffer in self.named_buffers():
            setattr(self, name, buffer.float())

    @override
    def forward(self, keys: Tensor, layer_number: int | None) -> Tensor:
        # An average carries no gradient to the keys.
        average = self.average.to(score_dtype(keys))
        if self.all_started:
            return average
        return torch.where(self.started > 0, average, super().forward(keys, layer_number))

    @override
    @torch.no_grad()
    def observe(self, x: Tensor, block_ids: Tensor) -> None:
        num_blocks = len(self.counts)
        ids, order = block_ids.flatten().sort(stable=True)
        # Offsets of the tokens of each block; the empty slots (id -1) come first.
        bag_ids = torch.arange(-1, num_blocks + 1, device=ids.device)
        offsets = torch.searchsorted(ids, bag_ids)
        # Tokens of a block are added in a fixed order, unlike with atomic additions.
        sums = F.embedding_bag(
            order // block_ids.shape[1],
            x.float(),
            offsets,
            mode="sum",
            include_last_offset=True,
        )
        self.sums += sums[1:]
        self.counts += offsets.diff()[1:]

    @override
    @torch.no_grad()
    def end_step(self) -> None:
        sums_and_counts = torch.cat((self.sums, self.counts[:, None]), dim=1)
        if self.group.size() > 1:
            torch.distributed.all_reduce(sums_and_counts, group=self.group)
        counts = sums_and_counts[:, -1:]
        mean = sums_and_counts[:, :-1] / counts.clamp(min=1)
        # A block's first average is that of its first tokens.
        decay = self.decay * self.started
        moved = decay * self.average + (1 - decay) * mean
        self.average.copy_(torch.where(counts > 0, moved, self.average))
        self.started.copy_(torch.where(counts > 0, 1.0, self.started))
        if not self.all_started:
            self.all_started = bool(self.started.all())
        self.sums.zero_()
        self.counts.zero_()


DESCRIPTORS: dict[str, type[Mean]] = {
    "mean": Mean,
    "max-norm": MaxNorm,
    "norm-weighted": NormWeighted,
    "learned": Learned,
    "subset": Subset,
    "ema": MovingAverage,
}
"""Value of `--sffn-descriptor` -> class of the descriptor."""
