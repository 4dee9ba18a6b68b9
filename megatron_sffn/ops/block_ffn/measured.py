"""Whether plain torch is faster than our C++ products on this machine, by a short measurement.

Inputs: dtype, cells of a block, width of a row. Outputs: True or False, and one line in the log.

Design notes: with large blocks the loop over blocks calls a BLAS, which beats our products on some
machines (AVX2) and not on others (AVX-512; benchmarks/NOTES.md). A result is kept in a file beside
the compiled kernels, so that runs on one machine always choose the same, and a resumed run computes
the same numbers. Sizes count by the next power of two.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_sffn.ops.block_ffn import torch_backend
from megatron_sffn.ops.block_ffn.autograd import Products
from megatron_sffn.ops.block_ffn.pairs import Sorted
from megatron_sffn.ops.compiled import library_path
from megatron_sffn.utils.atomic_files import atomic_write_text, read_json_object
from megatron_sffn.utils.errors import ConfigError

logger = logging.getLogger(__name__)

SMALLEST_BLOCK = 64
"""Cells per block below which the loop has never won, so nothing is measured."""
BLOCKS, ROWS_PER_BLOCK = 2, 256
"""Sizes of the measured call: 4,096 tokens with an expansion of 16 have as many rows per block."""
TURNS = 7
WINS_BELOW = 0.95
"""Time of the loop over that of the C++ products below which the loop is chosen."""

_ratios: dict[str, float] = {}
"""Ratios that this process knows already."""


def loop_is_faster(compiled: Products, dtype: torch.dtype, cells: int, width: int) -> bool:
    """True if the backend `torch` computes the products of these sizes faster than C++.

    Args:
        compiled: the C++ products.
        dtype: of all operands.
        cells: G, of a block.
        width: D, of a row.
    """
    if cells < SMALLEST_BLOCK:
        return False
    sizes = tuple(1 << (size - 1).bit_length() for size in (cells, width))
    name = f"{str(dtype).removeprefix('torch.')} G={sizes[0]} D={sizes[1]}"
    name += f" threads={torch.get_num_threads()}"
    if name not in _ratios:
        _ratios[name] = _ratio(name, compiled, dtype, *sizes)
    return _ratios[name] < WINS_BELOW


def _ratio(name: str, compiled: Products, dtype: torch.dtype, cells: int, width: int) -> float:
    """Time of the loop over that of the C++ products, measured once on a machine."""
    path = library_path().with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".json.lock").open("w") as lock:
        # The other processes wait, so that they neither disturb the measurement nor repeat it.
        fcntl.flock(lock, fcntl.LOCK_EX)
        known = _known(path)
        if name not in known:
            loop, ours = _seconds((torch_backend, compiled), dtype, cells, width)
            known[name] = round(loop / ours, 3)
            atomic_write_text(path, json.dumps(known, indent=1))
            chosen = "plain torch" if known[name] < WINS_BELOW else "C++ products"
            logger.info(
                "measured blocks of %d cells of width %d in %s: plain torch takes %.2f of the time "
                "of the C++ products; using %s (%s)",
                *(cells, width, dtype, known[name], chosen, path),
            )
    return float(known[name])


def _known(path: Path) -> dict[str, Any]:
    """The measured ratios; none if the file is missing or damaged."""
    try:
        return read_json_object(path)
    except ConfigError:
        return {}


def _seconds(
    candidates: Sequence[Products], dtype: torch.dtype, cells: int, width: int
) -> list[float]:
    """The least time of the three products for each candidate.

    They take turns, so that other work on the machine hits all of them.
    """
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(BLOCKS * ROWS_PER_BLOCK, width, dtype=dtype, generator=generator)
    table = torch.randn(BLOCKS, cells, width, dtype=dtype, generator=generator)
    pairs = Sorted(
        rows=torch.arange(len(rows), dtype=torch.int32),
        offsets=torch.arange(0, len(rows) + 1, ROWS_PER_BLOCK),
    )
    least = [math.inf] * len(candidates)
    for turn in range(TURNS + 1):
        for index, products in enumerate(candidates):
            start = time.perf_counter()
            coefficients = products.to_pairs(rows, table, pairs)
            products.to_rows(coefficients, table, pairs, len(rows))
            products.to_table(coefficients, rows, pairs)
            if turn > 0:  # the first one warms up
                least[index] = min(least[index], time.perf_counter() - start)
    return least
