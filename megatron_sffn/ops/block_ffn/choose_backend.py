"""Decide which backend computes a call of `block_ffn`: the only file that does.

`products_for` maps a name of `ops/backends.py` to a module with the three products, or to None for
the oracle. `resolve` replaces `auto` on a GPU and refuses a shape that the named backend cannot
compute. On a CPU `auto` is `cpu` or `torch`, whichever is faster there (`cpu.py`).

Inputs: a name, shapes, dtype and the GPU. Nothing waits for the device.

Design notes: on a GPU `auto` is the backend with the least estimated time. The estimates are
derived, not measured. Their unit is the time of a dense feed-forward layer with as many cells as a
token uses: 12·P·G·D operations, forward and backward.

| backend | estimate | because |
|---|---|---|
| `grouped` | max(1, 128/G) + copy/G | a tile has 128 cells; gathered and partial rows are copied |
| `masked` | 1.1·E, E = B·R/P | it multiplies all rows with all cells |
| `bags` | read·G | it reads a number from GPU memory for each multiplication |
| `torch` | 1 + copy/G + B · 0.1 ms | as `grouped`, with 14 kernel launches per block |

`copy` is the number of cells for which copying a row takes as long as multiplying it: 340 in 16
bits, 60 in fp32, whose products are slower. `read` is the time to read a number over the time to
multiply it: 240, and 42. `triton` and `quack` are left out until a GPU has timed them.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_sffn.ops import backends, device
from megatron_sffn.ops.block_ffn import bags, cpu, grouped, masked, quack, torch_backend
from megatron_sffn.ops.block_ffn.autograd import Products
from megatron_sffn.ops.block_ffn.pairs import Pairs
from megatron_sffn.utils.errors import ConfigError

logger = logging.getLogger(__name__)

COPY_CELLS = {torch.bfloat16: 340, torch.float16: 340, torch.float32: 60, torch.float64: 60}
"""Cells per block for which copying rows takes as long as multiplying, forward and backward."""

READ_COST = {torch.bfloat16: 240, torch.float16: 240, torch.float32: 42, torch.float64: 42}
"""Time to read a number from GPU memory over the time to multiply it."""

FLOPS = {torch.bfloat16: 7e14, torch.float16: 7e14, torch.float32: 6e13, torch.float64: 6e13}
"""Operations per second."""

TILE = 128
"""Cells per block below which a grouped product leaves part of its tiles empty."""

SECONDS_PER_BLOCK = 1e-4
"""Launch time of `torch` per block, forward and backward: 14 launches of 7 microseconds."""

NEED_SHAPES = ("grouped", "quack", "triton")
"""Backends that cannot compute every shape."""

TRITON_MULTIPLE = 16
"""`triton` needs widths that are multiples of this number. With other widths its kernels load two
bytes at a time and spill registers (328 bytes per thread at D = 100)."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of one call on one rank.

    Args:
        rows: R.
        pairs: P.
        blocks: B.
        cells: G, cells per block.
        width: D, width of the values.
        key_width: width of the keys; 0 if there are values alone.
    """

    rows: int
    pairs: int
    blocks: int
    cells: int
    width: int
    key_width: int


def resolve(backend: str, x: Tensor, keys: Tensor | None, values: Tensor, pairs: Pairs) -> str:
    """The backend that computes a call: on a GPU, `auto` becomes a name; other names stay.

    Raises:
        ConfigError: if a backend of `NEED_SHAPES` was named and cannot compute the call.
    """
    if backend not in NEED_SHAPES and not (backend == "auto" and device.is_gpu(values)):
        return backend
    shape = Shape(
        rows=len(x),
        pairs=len(pairs.rows),
        blocks=len(values),
        cells=values.shape[1],
        width=values.shape[2],
        key_width=0 if keys is None else keys.shape[2],
    )
    if backend == "auto":
        return choose_and_log(shape, values)
    if (why_not := refusal(backend, shape, values)) is not None:
        raise ConfigError(f"backend {backend} {why_not}; use auto, masked or torch")
    return backend


def products_for(backend: str, values: Tensor) -> Products | None:
    """The three products of a resolved backend; None for `naive`, which has no products.

    Args:
        backend: a name of `backends.BACKENDS`; `auto` is for a CPU.
        values: `[B, G, D]`, on the device and in the dtype to compute in.

    Raises:
        ConfigError: if the name does not exist, or the device or dtype does not fit.
    """
    backends.check(backend, values)
    match backend:
        case "naive":
            return None
        case "triton":
            kernels: Products = backends.triton_for(_import_triton, values)
            return kernels
        case "torch":
            return torch_backend
        case "grouped":
            return grouped
        case "quack":
            quack.kernels()  # raises here, before anything is computed, if it is not installed
            return quack
        case "masked":
            return masked
        case "bags":
            return bags
        case "cpu":
            return cpu.products(values.dtype, values.shape[1])
        case _:
            return cpu.fastest(values.dtype, *values.shape[1:])


def _import_triton() -> Any:
    """The Triton products, whose import needs the package triton."""
    from megatron_sffn.ops.block_ffn import triton

    return triton


def refusal(backend: str, shape: Shape, tensor: Tensor) -> str | None:
    """Why a backend of `NEED_SHAPES` cannot compute a call, as a clause; None if it can."""
    if backend == "triton":
        widths = {"the width of keys": shape.key_width, "the width of values": shape.width}
        return grouped.refusal_of_widths(widths, TRITON_MULTIPLE)
    if not shape.key_width:
        return "needs keys, but these are values without keys"
    return (quack if backend == "quack" else grouped).refusal(tensor, _widths(shape))


def _widths(shape: Shape) -> dict[str, int]:
    """The sizes that a grouped product wants to be multiples, by name."""
    return {
        "the width of keys": shape.key_width,
        "the width of values": shape.width,
        "the cells of a block": shape.cells,
    }


def estimates(shape: Shape, dtype: torch.dtype) -> dict[str, float]:
    """Estimated time of each backend in units of a dense layer, even if it cannot compute this."""
    num_pairs, cells = max(shape.pairs, 1), shape.cells
    copying = COPY_CELLS[dtype] / cells
    unit_seconds = 12 * num_pairs * cells * shape.width / FLOPS[dtype]
    return {
        "grouped": max(1, TILE / cells) + copying,
        "masked": 1.1 * shape.blocks * shape.rows / num_pairs,
        "bags": READ_COST[dtype] * cells,
        "torch": 1 + copying + shape.blocks * SECONDS_PER_BLOCK / unit_seconds,
    }


def choose(shape: Shape, tensor: Tensor) -> tuple[str, str]:
    """The backend that `auto` stands for on a GPU, and the reason.

    Args:
        shape: the sizes of the call.
        tensor: a tensor on the device and in the dtype to compute in.

    Returns:
        `grouped`, `masked`, `bags` or `torch`; a sentence for the log.
    """
    dtype = str(tensor.dtype).removeprefix("torch.")
    if not shape.key_width:
        return "bags", f"bags for values without keys in {dtype}"
    why_not = refusal("grouped", shape, tensor)
    backend, units = _fastest(shape, tensor.dtype, with_grouped=why_not is None)
    expansion = shape.blocks * shape.rows / max(shape.pairs, 1)
    reason = (
        f"{backend} for blocks of {shape.cells} cells in {dtype}, 1 in {expansion:.1f} active; "
        f"estimated time {units:.1f} times a dense layer's"
    )
    return backend, reason if why_not is None else f"{reason}; grouped {why_not}"


def choose_on_hopper(shape: Shape, dtype: torch.dtype) -> str:
    """The result of `choose` on a GPU of capability 9.0, for estimates on other machines."""
    if not shape.key_width:
        return "bags"
    fits = dtype is torch.bfloat16 and grouped.refusal_of_widths(_widths(shape)) is None
    return _fastest(shape, dtype, with_grouped=fits)[0]


def _fastest(shape: Shape, dtype: torch.dtype, *, with_grouped: bool) -> tuple[str, float]:
    """The backend with the least estimate, and the estimate."""
    units = estimates(shape, dtype)
    if not with_grouped:
        del units["grouped"]
    backend = min(units, key=lambda name: units[name])
    return backend, units[backend]


_logged: set[tuple[str, int, torch.dtype]] = set()


def choose_and_log(shape: Shape, tensor: Tensor) -> str:
    """`choose`, with a log line at the first call per backend, block size and dtype."""
    backend, reason = choose(shape, tensor)
    # The sentence is no key: its numbers change from one microbatch to the next.
    case = (backend, shape.cells, tensor.dtype)
    if case not in _logged:
        _logged.add(case)
        logger.info("block_ffn backend: %s", reason)
    return backend
