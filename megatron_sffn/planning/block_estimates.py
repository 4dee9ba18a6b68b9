"""Time of the block products of a sparse layer over those of a dense layer of as many active cells.

Inputs: the sizes of the call on one rank, and the card. Outputs: a ratio, and where it comes from.

Design notes: no GPU has timed the products yet, so every ratio for a GPU is *derived*: the roofline
of `ops/block_ffn/choose_backend.py`, which also decides what `auto` runs, with its cost of copying
rows scaled to the card, and with the padding of a block's rows to the tile. The ratios that were
*measured* here are of a CPU; they are shown beside the derived ones and enter no plan. A ratio that
the user has measured replaces the derived one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_sffn.ops.block_ffn import choose_backend
from megatron_sffn.planning.cluster import Cluster
from megatron_sffn.planning.workload import Workload

TILE_ROWS = 128
"""Rows of a tile of a grouped product; a block's last tile is half empty on average."""

REFERENCE_BYTES_PER_FLOP = 4.3e12 / choose_backend.FLOPS[torch.bfloat16]
"""Ratio of memory to tensor cores (H200) for which `COPY_CELLS` was derived."""

MEASURED_ON_CPU = {
    (1024, 4): 1.04,
    (256, 4): 1.02,
    (64, 4): 1.04,
    (16, 4): 1.12,
    (1, 4): 2.65,
    (1024, 16): 1.21,
    (256, 16): 1.64,
    (64, 16): 1.16,
    (16, 16): 1.22,
    (1, 16): 3.01,
}
"""(g, E) -> forward and backward over dense, fp32, D = 512, k = 2048, 2048 tokens (1024 at g = 1),
one thread with AVX-512 of a 2-core CPU, commit aa31707 (benchmarks/README.md)."""


@dataclass(frozen=True, kw_only=True)
class BlockEstimate:
    """The block products of one layer, forward and backward.

    Args:
        backend: that is the fastest by the estimate, or the one that was given.
        ratio: time over that of a dense layer with as many cells as a token uses.
        provenance: `derived` for a roofline, `measured` for a timing.
    """

    backend: str
    ratio: float
    provenance: str = "derived"


def estimate_blocks(workload: Workload, cluster: Cluster) -> BlockEstimate:
    """The estimate for a sparse layer of the run.

    Backends that have no estimate (`triton`, `quack`, `cpu`, `megatron`) count as grouped products.
    """
    sffn, layout = workload.shape.sffn, workload.layout
    assert sffn is not None, "a dense model has no blocks"
    if cluster.block_ratio is not None:
        return BlockEstimate(
            backend=sffn.backend.value, ratio=cluster.block_ratio, provenance="measured"
        )
    key_width = sffn.key_width(workload.shape.hidden_size)
    # Under uniform routing a rank computes as many pairs as its own tokens have, whatever EP is.
    pairs = max(1, workload.own_tokens * sffn.num_active_blocks * layout.etp)
    blocks = sffn.num_blocks // layout.ep
    shape = choose_backend.Shape(
        rows=min(pairs, workload.own_tokens * layout.expert_ranks),
        pairs=pairs,
        blocks=blocks,
        cells=sffn.block_size // layout.etp,
        width=sffn.row_width(workload.shape.hidden_size),
        key_width=key_width,
    )
    units = choose_backend.estimates(shape, layout.dtype)
    copying = choose_backend.COPY_CELLS[layout.dtype] / shape.cells
    slower_memory = REFERENCE_BYTES_PER_FLOP * cluster.flops / cluster.memory_bytes
    padding = 1 + TILE_ROWS / 2 * blocks / pairs
    units["grouped"] = (units["grouped"] - copying) * padding + copying * slower_memory
    units["torch"] += copying * (slower_memory - 1)
    if not key_width:
        return BlockEstimate(backend="bags", ratio=units["bags"])
    if sffn.backend != "auto":
        name = sffn.backend.value
        return BlockEstimate(backend=name, ratio=units.get(name, units["grouped"]))
    del units["bags"]
    fastest = min(units, key=lambda name: units[name])
    return BlockEstimate(backend=fastest, ratio=units[fastest])
