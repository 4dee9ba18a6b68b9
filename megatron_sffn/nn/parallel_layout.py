"""The one record of a parallel layout: how a run is split over ranks, and in which dtype.

Inputs: Megatron's arguments, through `flags.megatron_flags.layout_of`; or the sizes themselves.
Outputs: a `ParallelLayout`, from which communication volume, memory and tests read sizes.

Design notes: names are Megatron's abbreviations. What depends on more than the layout (microbatch
size, activation function, losses) is in `accounting.TrainingSetup`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class ParallelLayout:
    """Sizes of the parallel groups of a run, and the dtype of its weights and activations.

    Args:
        world_size: ranks of the run; 0 for the fewest ranks that form groups of these sizes.
        tp: tensor-parallel size.
        pp: pipeline-parallel size.
        virtual_stages: model chunks of a pipeline stage; above 1, the interleaved schedule runs.
        cp: context-parallel size.
        ep: expert-parallel size: the blocks are split over so many ranks.
        etp: expert-tensor-parallel size: the cells of a block are split over so many ranks.
        sequence_parallel: True if tensor-parallel ranks split the tokens outside of the matrices.
        dispatcher: value of `--moe-token-dispatcher-type`.
        dtype: dtype of weights and activations.
        comm_backend: backend of the process groups, `nccl` or `gloo`.
        router_groups: equal groups of consecutive blocks (`--moe-router-num-groups`), which bound
            the ranks that a token reaches.
        router_group_topk: in how many groups all blocks of a token are; 1 of 1 group where routing
            is not limited.
        first_stage_layers: layers of the first pipeline stage; None for an equal share.
        last_stage_layers: layers of the last pipeline stage; None for an equal share.
    """

    world_size: int = 0
    tp: int = 1
    pp: int = 1
    virtual_stages: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    sequence_parallel: bool = False
    dispatcher: str = "alltoall"
    dtype: torch.dtype = torch.float32
    comm_backend: str = "nccl"
    router_groups: int = 1
    router_group_topk: int = 1
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None

    def __post_init__(self) -> None:
        """Fill in the world size."""
        fewest = self.pp * math.lcm(self.tp * self.cp, self.expert_ranks)
        object.__setattr__(self, "world_size", self.world_size or fewest)

    @property
    def dp(self) -> int:
        """Data-parallel size: ranks that hold the same dense weights."""
        return self.world_size // (self.tp * self.cp * self.pp)

    @property
    def expert_dp(self) -> int:
        """Expert-data-parallel size: ranks that hold the same cells."""
        return self.world_size // (self.expert_ranks * self.pp)

    @property
    def expert_ranks(self) -> int:
        """EP · ETP: ranks that a token may have to visit, its own rank among them."""
        return self.ep * self.etp

    @property
    def bytes_per_number(self) -> int:
        """Bytes of a weight or an activation."""
        return self.dtype.itemsize

    @property
    def half_precision(self) -> bool:
        """True if numbers are narrower than fp32, so that fp32 master weights are copies."""
        return self.bytes_per_number < torch.float32.itemsize

    def layers_per_chunk(self, num_layers: int) -> list[int]:
        """Layers of each pipeline stage, for all first model chunks, then for all second ones.

        Stages have equal shares, unless the first or last stage has a fixed size. Where the chunks
        of a stage cannot be equal, the first ones have a layer more.
        """
        end_stages = [self.first_stage_layers, self.last_stage_layers]
        fixed = sum(count for count in end_stages if count is not None)
        free = self.pp - sum(count is not None for count in end_stages)
        counts = [(num_layers - fixed) // max(1, free)] * self.pp
        for place, count in zip((0, -1), end_stages, strict=True):
            counts[place] = counts[place] if count is None else count
        chunks = [
            count // self.virtual_stages + (chunk < count % self.virtual_stages)
            for chunk in range(self.virtual_stages)
            for count in counts
        ]
        assert sum(chunks) == num_layers, (chunks, num_layers)
        return chunks

    def megatron_sizes(self) -> dict[str, int | None]:
        """Sizes by Megatron's names, for `TransformerConfig` and `initialize_model_parallel`."""
        return {
            "tensor_model_parallel_size": self.tp,
            "pipeline_model_parallel_size": self.pp,
            "virtual_pipeline_model_parallel_size": (
                self.virtual_stages if self.virtual_stages > 1 else None
            ),
            "context_parallel_size": self.cp,
            "expert_model_parallel_size": self.ep,
            "expert_tensor_parallel_size": self.etp,
        }
