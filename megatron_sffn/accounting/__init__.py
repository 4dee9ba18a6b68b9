"""What a model costs before it is built, in closed form: numbers only.

Enters: the model's sizes (`ModelShape`), the sparse layer's config in it and, for memory, how ranks
are cut and train (`RankLayout`, `TrainingSetup`). Leaves: parameters, FLOPs, bytes of memory, and
the table that a run prints when it starts. No tensor is made. docs/accounting.md says what each
number counts.
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
from megatron_sffn.accounting.ranks import RankLayout, TrainingSetup, sparse_pattern
from megatron_sffn.accounting.shape import ModelShape, dense_equivalent
from megatron_sffn.accounting.table import human, table

__all__ = [
    "Flops",
    "ModelShape",
    "Parameters",
    "RankLayout",
    "RankMemory",
    "TrainingSetup",
    "count_parameters",
    "dense_equivalent",
    "flops_per_token",
    "human",
    "memory_per_rank",
    "overhead_over_dense",
    "sparse_pattern",
    "table",
    "training_flops_per_token",
]
