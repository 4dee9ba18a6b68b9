"""Which backend `auto` is on a GPU: the one that should take the least time, by shapes alone.

Inputs: shapes, dtype and the GPU. Outputs: a backend's name, and why. Nothing waits for the device.

Design notes: times are estimates, derived and not measured, in units of a dense feed-forward layer
of as many cells as a token uses: 12·P·G·D operations forward and backward.

| backend | estimate | because |
|---|---|---|
| `grouped` | max(1, 128/g) + moves/g | tiles have 128 cells; rows and parts of rows are copied |
| `masked` | 1.1·E, E = B·R/P | all rows meet all cells |
| `bags` | reads·g | each number that is multiplied comes from memory |
| `torch` | 1 + moves/g + B · 0.1 ms | as `grouped`, with 14 calls a block |

`moves` is the width in cells at which copying a row takes as long as multiplying it: 340 in 16
bits, 60 in fp32, whose products are slower. `reads` is how much longer it takes to read a number
than to multiply it: 240, and 42. `triton` is not among them until a GPU has timed it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sffn.ops.block_ffn import grouped, quack

logger = logging.getLogger(__name__)

MOVES = {torch.bfloat16: 340, torch.float16: 340, torch.float32: 60, torch.float64: 60}
"""Cells of a block for which copying takes as long as multiplying, forward and backward."""

MULTIPLIES = {torch.bfloat16: 7e14, torch.float16: 7e14, torch.float32: 6e13, torch.float64: 6e13}
"""Operations a second."""

READS = {torch.bfloat16: 240, torch.float16: 240, torch.float32: 42, torch.float64: 42}
"""How much longer a number takes to read than to multiply."""

TILE = 128
"""Cells of a block below which a grouped product leaves a part of its tiles empty."""

SECONDS_PER_BLOCK = 1e-4
"""That the loop needs for a block, forward and backward: 14 calls of 7 microseconds."""


NEED_SHAPES = ("grouped", "quack", "triton")
"""Backends that serve some shapes only."""

TRITON_MULTIPLE = 16
"""Numbers of which widths must be multiples for `triton`, whose kernels spill registers otherwise:
they then load two bytes at a time (328 bytes of a thread at D = 100)."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One call.

    Args:
        rows: R.
        pairs: P.
        blocks: B, of this rank.
        cells: G of a block.
        width: D, the values' width.
        key_width: the keys' width; 0 for a memory of values alone.
    """

    rows: int
    pairs: int
    blocks: int
    cells: int
    width: int
    key_width: int


def estimates(shape: Shape, dtype: torch.dtype) -> dict[str, float]:
    """Name of a backend -> units that it should take. Not whether it can."""
    pairs, cells = max(shape.pairs, 1), shape.cells
    moves = MOVES[dtype] / cells
    unit = 12 * pairs * cells * shape.width / MULTIPLIES[dtype]
    return {
        "grouped": max(1, TILE / cells) + moves,
        "masked": 1.1 * shape.blocks * shape.rows / pairs,
        "bags": READS[dtype] * cells,
        "torch": 1 + moves + shape.blocks * SECONDS_PER_BLOCK / unit,
    }


def refusal(backend: str, shape: Shape, tensor: Tensor) -> str | None:
    """Why one of `NEED_SHAPES` cannot compute a call, as `grouped.refusal`; None if it can."""
    if backend == "triton":
        widths = {"the width of keys": shape.key_width, "the width of values": shape.width}
        return grouped.refusal_of_widths(widths, TRITON_MULTIPLE)
    if not shape.key_width:
        return "needs keys, and there is a memory of values alone"
    return (quack if backend == "quack" else grouped).refusal(tensor, _widths(shape))


def _widths(shape: Shape) -> dict[str, int]:
    """Numbers of which a grouped product wants multiples, by name."""
    return {
        "the width of keys": shape.key_width,
        "the width of values": shape.width,
        "the cells of a block": shape.cells,
    }


def choose(shape: Shape, tensor: Tensor) -> tuple[str, str]:
    """The backend on a GPU, and the reason in words.

    Args:
        shape: of the call.
        tensor: of the dtype and on the device in question.

    Returns:
        `grouped`, `masked`, `bags` or `torch`; a sentence.
    """
    name = str(tensor.dtype).removeprefix("torch.")
    if not shape.key_width:
        return "bags", f"bags for a memory of values alone in {name}"
    why_not = refusal("grouped", shape, tensor)
    best, units = _least(shape, tensor.dtype, with_grouped=why_not is None)
    spread = shape.blocks * shape.rows / max(shape.pairs, 1)
    reason = (
        f"{best} for blocks of {shape.cells} cells in {name}, of which a row uses 1 in "
        f"{spread:.1f}; estimated at {units:.1f} times a dense layer"
    )
    return best, reason if why_not is None else f"{reason}; grouped {why_not}"


def on_hopper(shape: Shape, dtype: torch.dtype) -> str:
    """The backend on a GPU of capability 9.0, where there is none to ask; see `choose`."""
    if not shape.key_width:
        return "bags"
    fits = dtype is torch.bfloat16 and grouped.refusal_of_widths(_widths(shape)) is None
    return _least(shape, dtype, with_grouped=fits)[0]


def _least(shape: Shape, dtype: torch.dtype, *, with_grouped: bool) -> tuple[str, float]:
    """The backend of the least estimate, and this estimate; `grouped` only where it can compute."""
    units = estimates(shape, dtype)
    if not with_grouped:
        del units["grouped"]
    best = min(units, key=lambda backend: units[backend])
    return best, units[best]


_logged: set[tuple[str, int, torch.dtype]] = set()


def backend_of(shape: Shape, tensor: Tensor) -> str:
    """`choose`; logs the reason at the first call for a backend, a block size and a dtype."""
    best, reason = choose(shape, tensor)
    # Not by the sentence: the numbers in it change from one microbatch to the next.
    case = (best, shape.cells, tensor.dtype)
    if case not in _logged:
        _logged.add(case)
        logger.info("blocks: %s", reason)
    return best
