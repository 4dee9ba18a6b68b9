"""Collectives of tensor parallelism with sequence parallelism, in one microbatch of a stage.

Inputs: a `Workload`, and layers by their parts. Outputs: numbers of collectives, and their bytes.

Design notes
- The hidden states are gathered and scattered once around attention and once around a dense MLP,
  and gathered once more in the backward pass for the gradient of the weights (Korthikanti et al.
  2022, arXiv 2205.05198, section 4.2.2). A sparse layer routes the rank's own tokens and needs none
  of it, except for shared blocks.
- Multi-latent attention is that of Megatron's local modules: both down projections gather the
  hidden states, their products are gathered over the split width, and both up projections gather
  the latents over the split sequence.
- The projection of a multi-token prediction gathers two joined hidden states, and its product.
"""

from __future__ import annotations

from typing import NamedTuple

from megatron_sffn.accounting.shape import LayerCounts, ModelShape
from megatron_sffn.planning.workload import Workload


class Collectives(NamedTuple):
    """All-gathers and reduce-scatters: how many, and the sum of their widths in numbers."""

    calls: int = 0
    width: int = 0

    def plus(self, other: Collectives, times: int = 1) -> Collectives:
        """These, and others so many times."""
        return Collectives(self.calls + times * other.calls, self.width + times * other.width)


def collectives_of(workload: Workload, counts: LayerCounts, predictions: int = 0) -> Collectives:
    """The collectives of layers, forward, recomputed and backward.

    Args:
        workload: the run.
        counts: how often the layers have each part, those of multi-token predictions included.
        predictions: number of multi-token predictions.
    """
    shape, total = workload.shape, Collectives()
    if workload.layout.tp == 1:
        return total
    passes = (2 if workload.setup.recompute == "full" else 1, 1)
    shared = shape.sffn is not None and shape.sffn.shared_blocks > 0
    dense = counts.dense + (counts.sparse if shared else 0)
    kinds = (
        (counts.attentions, _attention(shape)),
        (dense, _around(shape.hidden_size)),
        (predictions, _projection(shape.hidden_size)),
    )
    for number, both_passes in kinds:
        for times, collectives in zip(passes, both_passes, strict=True):
            total = total.plus(collectives, number * times)
    return total


def collective_bytes(workload: Workload, collectives: Collectives) -> float:
    """Bytes that a rank sends in these collectives."""
    tp = workload.layout.tp
    numbers = workload.tokens * collectives.width
    return numbers * workload.layout.bytes_per_number * (tp - 1) / tp


def _around(width: int) -> tuple[Collectives, Collectives]:
    """A column-parallel and a row-parallel matrix: forward and backward."""
    return Collectives(2, 2 * width), Collectives(3, 3 * width)


def _attention(shape: ModelShape) -> tuple[Collectives, Collectives]:
    """One attention, forward and backward."""
    width, latent = shape.hidden_size, shape.latent_attention
    if latent is None:
        return _around(width)
    ranks = [rank for rank in (latent.q_lora_rank, latent.kv_lora_rank) if rank is not None]
    # Latents and the rotary part of keys are gathered over the width, cut along the sequence (whose
    # backward pass gathers), and gathered along it (whose backward pass reduces and scatters). The
    # up projections gather latents once more in the backward pass.
    widths, rotary = sum(ranks), latent.qk_pos_emb_head_dim
    forward = Collectives(3 + 2 * len(ranks) + 1, 3 * width + 2 * widths + 2 * rotary)
    backward = Collectives(5 + 3 * len(ranks) + 1, 5 * width + 3 * widths + 2 * rotary)
    return forward, backward


def _projection(width: int) -> tuple[Collectives, Collectives]:
    """The projection of one multi-token prediction, forward and backward."""
    return Collectives(2, 3 * width), Collectives(3, 5 * width)
