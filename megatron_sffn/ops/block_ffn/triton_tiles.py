"""How the Triton products are cut: the record of a tile, and the line of a table for a device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_sffn.ops import device, triton_launch

LEAST = 16
"""Least side of a tile of `tl.dot`; what is missing is masked."""


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """How a product is cut.

    Args:
        height: pairs, rows or cells of the result that a program owns, at most.
        columns: of the result that a program owns, at most.
        inner: terms of the sums that are loaded at a time, at most.
        warps: of a program.
        stages: of the loop's pipeline.
    """

    height: int
    columns: int
    inner: int
    warps: int
    stages: int


def choose(table: Mapping[tuple[str, torch.dtype, str], Tiles], tensor: Tensor, kind: str) -> Tiles:
    """The line for a tensor's device and dtype; "any" for devices without a line of their own."""
    return table.get((device.name(tensor), tensor.dtype, kind)) or table["any", tensor.dtype, kind]


def side(size: int, most: int) -> int:
    """Side of a tile: a power of two that holds `size`, within bounds."""
    return triton_launch.power_of_2(size, LEAST, most)


def launch(kernel: Any, programs: int, tiles: Tiles, **arguments: Any) -> None:
    """Start a kernel with the warps and stages of its tiles."""
    triton_launch.launch(kernel, programs, warps=tiles.warps, stages=tiles.stages, **arguments)
