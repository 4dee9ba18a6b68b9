"""Bytes that the sparse layers of a model send.

Inputs: the model's shape and the parallel layout. Outputs: the mean over its sparse layers, whose
routers may differ, of the closed forms in `nn/comm_volume.py`.
"""

from __future__ import annotations

from megatron_sffn.accounting.shape import ModelShape
from megatron_sffn.nn.comm_volume import exchanged_bytes_per_token, megatron_bytes_per_token
from megatron_sffn.nn.parallel_layout import ParallelLayout


def sent_per_token_and_layer(shape: ModelShape, layout: ParallelLayout) -> float:
    """Bytes sent per token in the forward pass of a sparse layer.

    Args:
        shape: shape of a model with sparse layers.
        layout: layout of the ranks, with a dispatcher of `DISPATCHERS`.
    """
    total = 0.0
    for _, sffn, count in shape.by_router(0):
        of_megatron = sffn.backend == "megatron"
        sent = megatron_bytes_per_token if of_megatron else exchanged_bytes_per_token
        total += count * sent(sffn, shape.hidden_size, layout)
    return total / shape.sparse_layers
