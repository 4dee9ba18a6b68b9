"""FLOPs of a model per token, forward and in training.

Inputs: a `ModelShape`. Outputs: exact counts of its matrix products; recurrent layers are counted
as Megatron counts them (`recurrent.py`).

Design notes
- One multiply-add is 2 FLOPs. Only matrix products count, and only work per token, but not work
  that is done once for all tokens.
- The convention is that of arXiv 2305.13999, whose numbers it reproduces. Attention spans all of
  `seq_length` (no causal halving). The keys of the chosen blocks count once, although our layer
  computes them again after a router that scores cells. The selection counts three times in
  training, although it has no backward pass where the router has no gate. Training a dense model
  with recomputation costs `96·l·h²·(1 + s/(6h) + V/(16·l·h))` per token (Narayanan et al. 2021).
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sffn.accounting.parameters import attention_matrices
from megatron_sffn.accounting.shape import ModelShape, dense_equivalent


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Forward FLOPs of a model per token.

    `feed_forward` is dense MLPs, the active blocks, and the projections of latent layers;
    `recurrent` is Mamba layers and gated delta nets.
    """

    attention: int
    feed_forward: int
    router: int
    logits: int
    recurrent: int = 0

    @property
    def total(self) -> int:
        """FLOPs of the whole model."""
        mixing = self.attention + self.recurrent
        return mixing + self.feed_forward + self.router + self.logits


def flops_per_token(shape: ModelShape) -> Flops:
    """Forward FLOPs of the whole model for one token."""
    width, depth = shape.hidden_size, shape.predicted_tokens
    # A multi-token prediction has a projection, layers, and logits.
    counts = shape.layers_with(depth)
    active = counts.dense * shape.ffn_hidden_size * shape.dense_cell
    router = 0
    for layer, sffn, count in shape.by_router(depth):
        cells = sffn.chosen_cells * layer.sparse_cell + sffn.shared_cells * layer.dense_cell
        active += count * (cells + layer.latent_projections)
        router += count * sffn.router.flops(sffn, layer.router_width, gated=layer.gated)
    joined = depth * 4 * width * width
    return Flops(
        attention=counts.attentions * _attention_flops(shape),
        feed_forward=2 * active + joined,
        router=router,
        logits=(1 + depth) * 2 * width * shape.padded_vocab_size,
        recurrent=counts.mambas * shape.mamba.flops(width)
        + counts.delta_nets * shape.delta_net.flops(width),
    )


def _attention_flops(shape: ModelShape) -> int:
    """Forward FLOPs of one attention."""
    return 2 * attention_matrices(shape) + score_flops(shape)


def score_flops(shape: ModelShape) -> int:
    """Forward FLOPs per token of attention's scores, and of the weighted sum of values."""
    if (latent := shape.latent_attention) is not None:
        widths = latent.query_width + latent.v_head_dim
        return 2 * shape.seq_length * shape.num_attention_heads * widths
    return 4 * shape.seq_length * shape.query_width


def training_flops_per_token(shape: ModelShape, *, recompute: bool) -> int:
    """FLOPs of forward and backward (two forwards) for one token.

    Args:
        shape: shape of the model.
        recompute: True if the layers run forward once more in the backward pass, as in Megatron's
            full activation recomputation; the logits never do.
    """
    forward = flops_per_token(shape)
    return 3 * forward.total + (forward.total - forward.logits if recompute else 0)


def overhead_over_dense(shape: ModelShape) -> float:
    """Forward FLOPs over those of the dense equivalent, minus 1."""
    return flops_per_token(shape).total / flops_per_token(dense_equivalent(shape)).total - 1
