"""Tile sizes of the Triton products: the record, and the look-up by device and dtype."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_sffn.ops import device, triton_launch

LEAST = 16
"""Least side of a tile that `tl.dot` accepts; a smaller tensor is masked."""


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """The tile sizes of a product; the first three are upper bounds.

    Args:
        height: pairs, rows or cells of the result that a program owns.
        columns: columns of the result that a program owns.
        inner: terms of each sum that are loaded at a time.
        warps: warps per program.
        stages: pipeline stages of the loop.
    """

    height: int
    columns: int
    inner: int
    warps: int
    stages: int


def choose(table: Mapping[tuple[str, torch.dtype, str], Tiles], tensor: Tensor, kind: str) -> Tiles:
    """The entry for a tensor's device and dtype; "any" for a device without an entry."""
    return table.get((device.name(tensor), tensor.dtype, kind)) or table["any", tensor.dtype, kind]


def side(size: int, most: int) -> int:
    """Side of a tile: the least power of two that is `size` or more, from `LEAST` to `most`."""
    return triton_launch.power_of_2(size, LEAST, most)


def launch(kernel: Any, programs: int, tiles: Tiles, **arguments: Any) -> None:
    """Launch a kernel with the warps and stages of its tiles."""
    triton_launch.launch(kernel, programs, warps=tiles.warps, stages=tiles.stages, **arguments)
