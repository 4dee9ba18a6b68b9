"""FLOPs of a model per token, forward and in training.

Enters: a `ModelShape`. Leaves: exact counts of its matrix products.

Choices
- One multiply-add is 2 FLOPs; only matrix products count, and no work that all tokens share.
- The convention of arXiv 2305.13999, so that its numbers come out: attention spans all of
  `seq_length` (no causal halving), the chosen blocks' keys are not counted twice by routers that
  score cells (our layer computes them again), and selection trains at the price of any product,
  although that of routers without a gate has no backward. Training a dense model with recomputation
  then costs `96·l·h²·(1 + s/(6h) + V/(16·l·h))` per token (Narayanan et al. 2021).
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sffn.accounting.shape import ModelShape, dense_equivalent


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Forward FLOPs of a model per token: `feed_forward` is dense MLPs and blocks that are used."""

    attention: int
    feed_forward: int
    router: int
    logits: int

    @property
    def total(self) -> int:
        """Their sum."""
        return self.attention + self.feed_forward + self.router + self.logits


def flops_per_token(shape: ModelShape) -> Flops:
    """Forward FLOPs of the whole model for one token."""
    width, sparse, sffn = shape.hidden_size, shape.sparse_layers, shape.sffn
    projections = 2 * width * (shape.projected_width + shape.query_width)
    scores_and_sum = 4 * shape.seq_length * shape.query_width
    used = (shape.num_layers - sparse) * shape.ffn_hidden_size * shape.dense_cell
    router = 0
    if sffn is not None:
        used += sparse * sffn.chosen_cells * shape.memory_cell
        used += sparse * sffn.shared_cells * shape.dense_cell
        router = sparse * sffn.router.flops(sffn, width, gated=shape.gated)
    # A layer of multi-token prediction: a projection, a dense layer, and logits of its own.
    depth = shape.predicted_tokens
    joined = depth * 4 * width * width
    used += depth * shape.ffn_hidden_size * shape.dense_cell
    return Flops(
        attention=(shape.num_layers + depth) * (projections + scores_and_sum),
        feed_forward=2 * used + joined,
        router=router,
        logits=(1 + depth) * 2 * width * shape.padded_vocab_size,
    )


def training_flops_per_token(shape: ModelShape, *, recompute: bool) -> int:
    """FLOPs of forward and backward (two forwards) for one token.

    Args:
        shape: of the model.
        recompute: whether the layers run forward once more in the backward, as in Megatron's full
            activation recomputation; the logits never do.
    """
    forward = flops_per_token(shape)
    return 3 * forward.total + (forward.total - forward.logits if recompute else 0)


def overhead_over_dense(shape: ModelShape) -> float:
    """Forward FLOPs over those of the dense equivalent, minus 1."""
    return flops_per_token(shape).total / flops_per_token(dense_equivalent(shape)).total - 1
