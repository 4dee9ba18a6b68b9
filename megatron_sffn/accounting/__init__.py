"""Computes the costs of a model in closed form, before it is built.

Inputs: the model's sizes (`ModelShape`), which contain the sparse layer's config, and for memory
the `ParallelLayout` and the `TrainingSetup`. Outputs: parameters, FLOPs, bytes of memory, and the
table that a run prints when it starts. No tensor is made. docs/accounting.md says what each number
counts.
"""

from __future__ import annotations

from megatron_sffn.accounting.flops import (
    Flops,
    flops_per_token,
    overhead_over_dense,
    training_flops_per_token,
)
from megatron_sffn.accounting.memory import RankMemory, memory_per_rank
from megatron_sffn.accounting.parameters import Parameters, count_parameters
from megatron_sffn.accounting.pipeline_stages import layer_parts
from megatron_sffn.accounting.sent_bytes import sent_per_token_and_layer
from megatron_sffn.accounting.shape import ModelShape, dense_equivalent
from megatron_sffn.accounting.table import human, table
from megatron_sffn.accounting.training_setup import TrainingSetup

__all__ = [
    "Flops",
    "ModelShape",
    "Parameters",
    "RankMemory",
    "TrainingSetup",
    "count_parameters",
    "dense_equivalent",
    "flops_per_token",
    "human",
    "layer_parts",
    "memory_per_rank",
    "overhead_over_dense",
    "sent_per_token_and_layer",
    "table",
    "training_flops_per_token",
]
