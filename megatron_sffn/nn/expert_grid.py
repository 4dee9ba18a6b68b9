"""The grid of ranks that hold the cells: EP ranks split the blocks, ETP ranks the cells of a block.

Inputs: Megatron's process groups. Outputs: an `ExpertGrid`, by which block weights are sharded,
scores and descriptors gathered, and tokens dispatched.

Design notes: expert parallelism (EP) and expert tensor parallelism (ETP) are one grid of ranks, and
one process group exchanges over it. A block lies on the ETP ranks of its EP rank, a slice of its
cells on each rank. A token visits every rank that holds cells of its blocks, once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_sffn.nn.comm_volume import num_nodes
from megatron_sffn.nn.config import SparseFFNConfig


@dataclass(frozen=True, kw_only=True)
class ExpertGrid:
    """A grid of ranks: blocks are split along its EP axis, the cells of a block along its ETP axis.

    Args:
        group: process group of the grid's ranks; rank r is at (r // etp_size, r % etp_size).
        ep_size: expert-parallel size; it divides B.
        etp_size: expert-tensor-parallel size; it divides G.
        num_blocks: B.
        block_size: G.
        node_groups: where rows cross to each node once, two groups: the ranks at this rank's
            position in every node, and the ranks of this rank's node. None otherwise.
    """

    group: Any
    ep_size: int
    etp_size: int
    num_blocks: int
    block_size: int
    node_groups: tuple[Any, Any] | None = None

    @classmethod
    def of(cls, pg_collection: ProcessGroupCollection, sffn: SparseFFNConfig) -> ExpertGrid:
        """The grid of Megatron's groups: `tp_ep` is the grid, `ep` and `expt_tp` are its axes."""
        ep_group, etp_group = pg_collection.ep, pg_collection.expt_tp
        expert_grid = cls(
            group=pg_collection.tp_ep,
            ep_size=ep_group.size(),
            etp_size=etp_group.size(),
            num_blocks=sffn.num_blocks,
            block_size=sffn.block_size,
            node_groups=_node_groups(pg_collection.tp_ep, sffn.node_size),
        )
        position = (expert_grid.ep_rank, expert_grid.etp_rank)
        megatron_position = (ep_group.rank(), etp_group.rank())
        assert position == megatron_position, (position, megatron_position)
        assert sffn.num_blocks % ep_group.size() == 0, (sffn.num_blocks, ep_group.size())
        assert sffn.block_size % etp_group.size() == 0, (sffn.block_size, etp_group.size())
        return expert_grid

    @property
    def num_ranks(self) -> int:
        """Ranks of the grid."""
        return self.ep_size * self.etp_size

    @property
    def ep_rank(self) -> int:
        """This rank's position on the EP axis."""
        return int(self.group.rank()) // self.etp_size

    @property
    def etp_rank(self) -> int:
        """This rank's position on the ETP axis."""
        return int(self.group.rank()) % self.etp_size

    @property
    def num_local_blocks(self) -> int:
        """Blocks of which this rank holds cells."""
        return self.num_blocks // self.ep_size

    @property
    def num_local_cells(self) -> int:
        """Cells that this rank holds of each of its blocks."""
        return self.block_size // self.etp_size

    @property
    def first_block(self) -> int:
        """The first block of which this rank holds cells."""
        return self.ep_rank * self.num_local_blocks

    def levels(self) -> tuple[ExpertGrid, ExpertGrid]:
        """The two exchanges of a grid on several nodes: across nodes, then within a node.

        In the grid across nodes, a node is one rank that holds all blocks of the node's ranks. In
        the grid within a node, block ids count from the node's first block.
        """
        assert self.node_groups is not None, "the grid is on one node"
        across_group, within_group = self.node_groups
        nodes = across_group.size()
        return (
            replace(self, group=across_group, ep_size=nodes, etp_size=1, node_groups=None),
            replace(
                self,
                group=within_group,
                ep_size=self.ep_size // nodes,
                num_blocks=self.num_blocks // nodes,
                node_groups=None,
            ),
        )

    def local_cells(self, cells: Tensor) -> Tensor:
        """This rank's slice `[B / ep, G / etp, ...]` of numbers of all cells `[B, G, ...]`."""
        cells = cells.narrow(0, self.first_block, self.num_local_blocks)
        return cells.narrow(1, self.etp_rank * self.num_local_cells, self.num_local_cells)

    def gather_blocks(self, local: Tensor) -> Tensor:
        """Gather `[B / ep, ...]` of every rank into `[B, etp, ...]` on every rank.

        Differentiable: the backward pass sums the gradients of all ranks.
        """
        gathered = gather_rows(local, self.group)
        grid = (self.ep_size, self.etp_size, self.num_local_blocks)
        return gathered.view(*grid, *local.shape[1:]).transpose(1, 2).flatten(0, 1)

    def sum_over_cells(self, local: Tensor) -> Tensor:
        """From sums over this rank's cells `[B / ep, ...]` to sums over all cells `[B, ...]`.

        Every rank adds the ETP slices in the same order, so that all ranks have the same bits.
        """
        return self.gather_blocks(local).sum(dim=1)


@cache
class OneRankGroup:
    """A process group of one rank, for a process without torch.distributed."""

    def size(self) -> int:
        """Number of ranks."""
        return 1

    def rank(self) -> int:
        """This process's rank."""
        return 0


def gather_rows(rows: Tensor, group: Any) -> Tensor:
    """All-gather rows in the order of ranks; the backward pass sums gradients over the ranks."""
    if group.size() == 1:
        return rows  # also where torch.distributed is not initialised
    gathered: Tensor = gather_from_sequence_parallel_region(rows, group=group)
    return gathered


def one_rank_groups() -> ProcessGroupCollection:
    """The process groups that a layer asks for, in a process without torch.distributed."""
    names = ("tp", "cp", "ep", "expt_tp", "expt_dp", "tp_ep", "tp_cp", "tp_dp_cp")
    return ProcessGroupCollection(**{name: OneRankGroup() for name in names})


def _node_groups(group: Any, node_size: int) -> tuple[Any, Any] | None:
    """The groups of `ExpertGrid.node_groups`, made once for all layers; None on one node.

    All ranks of the grid call this together. Consecutive ranks of Megatron lie on one node.
    """
    if num_nodes(group.size(), node_size) == 1:
        return None
    ranks = torch.distributed.get_process_group_ranks(group)
    node, position = divmod(group.rank(), node_size)
    within, across = ranks[node * node_size : (node + 1) * node_size], ranks[position::node_size]
    within_group, across_group = (
        torch.distributed.new_group(members, use_local_synchronization=True)
        for members in (within, across)
    )
    return across_group, within_group
