"""Matrices that Muon orthogonalises on a rank, and the FLOPs of one step.

Inputs: the model's shape, a pipeline stage, the layout and Muon's settings. Outputs: `Matrix` ->
how many of them, and exact counts of the products of Newton-Schulz.

Design notes
- One iteration on a matrix of m rows and n >= m columns (else it is transposed) multiplies it with
  its transpose (2 m² n FLOPs), the product with itself (2 m³), and that with the matrix (2 m² n):
  `newton_schulz_step` of emerging-optimizers, after Jordan et al. 2024.
- The keys of a block are a matrix, and so are its values, in batches (`patches/muon.py`); expert
  tensor parallelism computes whole matrices on each rank. Megatron's rule is for other weights.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from megatron_sffn.accounting.held_parameters import held_by_router, held_layers
from megatron_sffn.accounting.pipeline_stages import Stage
from megatron_sffn.accounting.shape import ModelShape
from megatron_sffn.nn.parallel_layout import ParallelLayout


@dataclass(frozen=True, kw_only=True)
class Muon:
    """Muon's settings, by the names of Megatron's flags.

    Args:
        num_ns_steps: iterations of Newton-Schulz.
        tp_mode: what a rank orthogonalises of a weight that TP splits: its part (`blockwise`), the
            whole (`duplicated`), or the whole together with the others (`distributed`).
        split_qkv: True if queries, keys and values are three matrices.
        half: True if the products are in bf16 (`--muon-fp32-matmul-prec medium`).
    """

    num_ns_steps: int = 5
    tp_mode: str = "blockwise"
    split_qkv: bool = True
    half: bool = True


@dataclass(frozen=True)
class Matrix:
    """A weight matrix, on all ranks that hold parts of it together.

    Args:
        rows: its rows.
        columns: its columns.
        split: the dimension that tensor parallelism splits, over one rank or more; None for none.
        etp: True for a matrix of a block, whose rows expert tensor parallelism splits.
    """

    rows: int
    columns: int
    split: int | None = None
    etp: bool = False

    def ranks(self, layout: ParallelLayout) -> int:
        """Ranks that hold parts of it."""
        if self.etp:
            return layout.etp
        return 1 if self.split is None else layout.tp

    def sides(self, muon: Muon, layout: ParallelLayout) -> tuple[int, int]:
        """Rows and columns of what one rank multiplies: the iteration squares the rows."""
        sizes, ranks = [self.rows, self.columns], self.ranks(layout)
        if self.split is not None and muon.tp_mode != "duplicated":
            sizes[self.split] //= ranks
            if muon.tp_mode == "distributed":  # whatever side is the shorter one
                return sizes[1 - self.split], sizes[self.split]
        return min(sizes), max(sizes)

    def flops(self, muon: Muon, layout: ParallelLayout) -> int:
        """FLOPs on one rank in one step."""
        rows, columns = self.sides(muon, layout)
        return muon.num_ns_steps * (4 * rows**2 * columns + 2 * rows**3)


def muon_matrices(
    shape: ModelShape, stage: Stage, layout: ParallelLayout, muon: Muon
) -> Counter[Matrix]:
    """The matrices that a rank of one stage has at least parts of."""
    counts, width = held_layers(shape, stage), shape.hidden_size
    predictions = shape.own_predictions if stage.last else 0
    matrices: Counter[Matrix] = Counter()
    for matrix in _attention(shape, muon):
        matrices[matrix] += counts.attentions
    for matrix in _mlp(shape, shape.ffn_hidden_size):
        matrices[matrix] += counts.dense
    for layer, _, count in held_by_router(shape, stage):
        _add(matrices, _beside_blocks(layer), count)
        _add(matrices, _blocks(layer, layout), layer.tables(count, predictions))
    matrices[Matrix(width, 2 * width, 0)] += predictions
    if shape.learned_positions and (stage.first or predictions):
        matrices[Matrix(shape.learned_positions, width)] += 1
    return +matrices


def muon_flops(shape: ModelShape, stage: Stage, layout: ParallelLayout, muon: Muon) -> int:
    """FLOPs of Newton-Schulz on a rank of one stage in one step."""
    matrices = muon_matrices(shape, stage, layout, muon)
    return sum(count * matrix.flops(muon, layout) for matrix, count in matrices.items())


def _attention(shape: ModelShape, muon: Muon) -> list[Matrix]:
    """The projections of one attention."""
    width, heads, latent = shape.hidden_size, shape.num_attention_heads, shape.latent_attention
    if latent is None:
        rows = [shape.query_width] * (2 if shape.output_gate else 1)
        rows += [shape.key_value_width // 2] * 2
        rows = rows if muon.split_qkv else [shape.projected_width]
        return [*(Matrix(count, width, 0) for count in rows), Matrix(width, shape.query_width, 1)]
    queries = [Matrix(heads * latent.query_width, width, 0)]
    if (rank := latent.q_lora_rank) is not None:
        queries = [Matrix(rank, width, 0), Matrix(heads * latent.query_width, rank, 0)]
    return [
        *queries,
        Matrix(latent.kv_lora_rank + latent.qk_pos_emb_head_dim, width, 0),
        Matrix(heads * (latent.qk_head_dim + latent.v_head_dim), latent.kv_lora_rank, 0),
        Matrix(width, heads * latent.v_head_dim, 1),
    ]


def _mlp(shape: ModelShape, cells: int) -> list[Matrix]:
    """The keys and the values of a dense MLP or of shared blocks; gate and up keys are one."""
    if not cells:
        return []
    width = shape.hidden_size
    return [Matrix(shape.keys_per_cell * cells, width, 0), Matrix(width, cells, 1)]


def _add(matrices: Counter[Matrix], added: Counter[Matrix], times: int) -> None:
    """Add matrices that a rank has so many times."""
    for matrix, count in added.items():
        matrices[matrix] += times * count


def _beside_blocks(shape: ModelShape) -> Counter[Matrix]:
    """The matrices of a sparse layer's router, shared blocks and latent projections."""
    sffn, width = shape.sffn, shape.hidden_size
    assert sffn is not None
    weights = sffn.router.weights(sffn, shape.router_width).values()
    matrices = Counter(Matrix(*sizes) for sizes in weights if len(sizes) == 2)
    matrices.update(_mlp(shape, sffn.shared_cells))
    if sffn.latent_size is not None:
        matrices[Matrix(width, sffn.latent_size)] += 2
    return matrices


def _blocks(shape: ModelShape, layout: ParallelLayout) -> Counter[Matrix]:
    """The matrices of a table's blocks on one rank; values without keys are none."""
    sffn, matrices = shape.sffn, Counter[Matrix]()
    assert sffn is not None
    key_width, width = sffn.key_width(shape.hidden_size), sffn.row_width(shape.hidden_size)
    if not key_width:
        return matrices
    blocks, keys = sffn.num_blocks // layout.ep, shape.keys_per_cell
    if sffn.backend == "megatron":  # gate and up keys of an expert are one matrix
        matrices[Matrix(keys * sffn.block_size, key_width, 0)] += blocks
        matrices[Matrix(width, sffn.block_size, 1)] += blocks
    else:
        matrices[Matrix(sffn.block_size, key_width, None, True)] += blocks * keys
        matrices[Matrix(sffn.block_size, width, None, True)] += blocks
    return matrices


def held_numbers(matrices: Counter[Matrix], layout: ParallelLayout) -> int:
    """Numbers of the matrices that lie on the rank."""
    return sum(
        count * math.prod((matrix.rows, matrix.columns)) // matrix.ranks(layout)
        for matrix, count in matrices.items()
    )
