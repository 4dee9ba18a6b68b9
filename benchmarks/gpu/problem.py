"""Draw tokens, tables and routing of a layer on the device that computes.

Inputs: the sizes of a layer, and a kind of load. Outputs: the `Problem` of `benchmarks.blocks`,
so that its oracle and peers can be used.

Design notes: the K distinct blocks of a row are an arithmetic sequence modulo B with a random start
and a random odd step, where B is a power of two. That is close enough to uniform, and needs no T ×
B random numbers (at g = 1 and real sizes 4 billion).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.blocks.problem import Problem
from megatron_sffn.ops.activation import Activation
from megatron_sffn.ops.block_ffn import torch_backend
from megatron_sffn.ops.block_ffn.pairs import Sorted

LOADS = ("uniform", "skewed", "empty")
"""Uniform; block 0 in every row; half of the blocks and a quarter of the rows without a pair."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """The numbers of a layer.

    Args:
        tokens: T.
        width: D.
        active: k, cells that a token uses.
        cells: g of a block.
        expansion: E.
        dtype: dtype of tokens and tables.
        load: one of `LOADS`.
        gated: True if a gate multiplies each block's output.
        activation: f.
    """

    tokens: int
    width: int
    active: int
    cells: int
    expansion: int
    dtype: torch.dtype
    load: str = "uniform"
    gated: bool = True
    activation: Activation = Activation.GELU

    @property
    def num_blocks(self) -> int:
        """B."""
        return self.expansion * self.active // self.cells

    @property
    def num_active(self) -> int:
        """K."""
        return self.active // self.cells

    @property
    def name(self) -> str:
        """A description of the size."""
        kind = "" if self.load == "uniform" else f" {self.load}"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"g={self.cells} E={self.expansion} T={self.tokens} D={self.width} {dtype}{kind}"


def draw(size: Size, device: torch.device) -> Problem:
    """The problem of a size, the same for the same size and kind of device."""
    generator = torch.Generator(device).manual_seed(1)
    keys = size.cells * (2 if size.activation.gated else 1)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        numbers = torch.empty(shape, dtype=size.dtype, device=device)
        return numbers.normal_(0.0, scale, generator=generator)

    ids = draw_ids(size, device, generator)
    gates = torch.rand(ids.shape, device=device, generator=generator) + 0.5
    return Problem(
        x=normal(size.tokens, size.width),
        dy=normal(size.tokens, size.width),
        keys=normal(size.num_blocks, keys, size.width, scale=size.width**-0.5),
        values=normal(size.num_blocks, size.cells, size.width, scale=size.active**-0.5),
        block_ids=ids,
        gates=gates if size.gated else None,
        activation=size.activation,
    )


def draw_ids(size: Size, device: torch.device, generator: torch.Generator) -> Tensor:
    """`[T, K]` int64 ids, distinct within a row; -1, for no block, occurs in an empty load."""
    blocks = size.num_blocks // 2 if size.load == "empty" else size.num_blocks
    assert blocks & (blocks - 1) == 0 and size.num_active <= blocks, (blocks, size.num_active)

    def integers() -> Tensor:
        return torch.randint(blocks, (size.tokens, 1), device=device, generator=generator)

    places = torch.arange(size.num_active, device=device)
    ids = (integers() + (2 * integers() + 1) * places) % blocks
    if size.load == "skewed":
        # The first id of a row becomes block 0, unless the row has it already.
        has_zero = (ids == 0).any(dim=1)
        ids[:, 0] = torch.where(has_zero, ids[:, 0], 0)
    if size.load == "empty":
        ids[::4] = -1
    return ids


def sorted_pairs(ids: Tensor, num_blocks: int) -> Sorted:
    """The pairs of those `[T, K]` ids that are not negative, sorted by block."""
    tokens, active = ids.shape
    rows = torch.arange(tokens, dtype=torch.int32, device=ids.device).repeat_interleave(active)
    blocks = ids.reshape(-1).int()
    rows, blocks = rows[blocks >= 0], blocks[blocks >= 0]
    order, offsets = torch_backend.sort(blocks, num_blocks)
    return Sorted(rows=rows.index_select(0, order), offsets=offsets)
