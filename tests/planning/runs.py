"""Small runs to plan, and clusters for them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from megatron_sffn.accounting import ModelShape, TrainingSetup
from megatron_sffn.nn.config import SparseFFNConfig
from megatron_sffn.nn.parallel_layout import ParallelLayout
from megatron_sffn.nn.routers.softmax_after import SoftmaxAfterConfig
from megatron_sffn.planning.cluster import CARDS, Cluster
from megatron_sffn.planning.workload import Workload

FLAGS = (
    "--num-layers 8 --hidden-size 256 --num-attention-heads 4 --seq-length 512 "
    "--max-position-embeddings 512 --vocab-size 1000 --global-batch-size 64 --bf16 "
    "--use-distributed-optimizer --sffn-layers every:2 --sffn-block-size 128"
)
"""A run that fits on any card."""


def workload(
    layout: ParallelLayout,
    *,
    sparse: bool = True,
    microbatches: int = 4,
    model: dict[str, Any] | None = None,
    **setup: Any,
) -> Workload:
    """A model of 8 layers, half of them sparse, in a layout.

    Args:
        layout: layout of the ranks.
        sparse: False for a dense model.
        microbatches: microbatches of a step.
        model: other sizes of the model.
        setup: other numbers of the training.
    """
    sffn = SparseFFNConfig(
        active_cells=1024, block_size=128, expansion=4, router=SoftmaxAfterConfig()
    )
    parts = ("*-", "*E" if sparse else "*-") * 4
    shape = ModelShape(
        num_layers=8,
        hidden_size=256,
        ffn_hidden_size=1024,
        num_attention_heads=4,
        kv_channels=64,
        seq_length=512,
        padded_vocab_size=1024,
        sparse_layers=4 if sparse else 0,
        sffn=sffn if sparse else None,
    )
    return Workload(
        shape=replace(shape, **(model or {})),
        parts=parts,
        layout=replace(layout, dtype=torch.bfloat16, sequence_parallel=layout.tp > 1),
        setup=TrainingSetup(
            num_microbatches=microbatches, distributed_optimizer=True, cuda=True, **setup
        ),
    )


def cluster(gpus: int = 8, **numbers: Any) -> Cluster:
    """H100 in nodes of 8, with other numbers of the card where they are given."""
    return Cluster(gpus=gpus, gpus_per_node=8, card=replace(CARDS["h100"], **numbers))
