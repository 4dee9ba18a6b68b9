"""Which rank holds which cells: blocks are cut over EP ranks, the cells of a block over ETP ranks.

Enters: Megatron's process groups. Leaves: a `ExpertGrid`, with which tables are cut, scores and
descriptors gathered, and tokens sent.

Choice: expert parallelism (EP) and expert tensor parallelism (ETP) are one grid of ranks, and one
group exchanges over it. A block lies on the ETP ranks of its EP rank, a slice of its cells on each;
a token visits every rank that holds cells of it, once.
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
    """A grid of ranks with the blocks along one side and the cells of a block along the other.

    Args:
        group: of all ranks of the grid; rank r is at (r // etp_size, r % etp_size).
        ep_size: expert-parallel size; it divides B.
        etp_size: expert-tensor-parallel size; it divides G.
        num_blocks: B.
        block_size: G.
        node_groups: where ranks lie on several nodes and rows shall cross to each node once: the
            group of the ranks at this rank's place in every node, and that of its own node.
    """

    group: Any
    ep_size: int
    etp_size: int
    num_blocks: int
    block_size: int
    node_groups: tuple[Any, Any] | None = None

    @classmethod
    def of(cls, pg_collection: ProcessGroupCollection, sffn: SparseFFNConfig) -> ExpertGrid:
        """The grid of Megatron's groups: `tp_ep` is all of it, `ep` and `expt_tp` are its sides."""
        blocks, cells = pg_collection.ep, pg_collection.expt_tp
        expert_grid = cls(
            group=pg_collection.tp_ep,
            ep_size=blocks.size(),
            etp_size=cells.size(),
            num_blocks=sffn.num_blocks,
            block_size=sffn.block_size,
            node_groups=_node_groups(pg_collection.tp_ep, sffn.node_size),
        )
        here = (expert_grid.ep_rank, expert_grid.etp_rank)
        assert here == (blocks.rank(), cells.rank()), (here, blocks.rank(), cells.rank())
        assert sffn.num_blocks % blocks.size() == 0, (sffn.num_blocks, blocks.size())
        assert sffn.block_size % cells.size() == 0, (sffn.block_size, cells.size())
        return expert_grid

    @property
    def num_ranks(self) -> int:
        """Ranks of the grid."""
        return self.ep_size * self.etp_size

    @property
    def ep_rank(self) -> int:
        """Where this rank is along the blocks."""
        return int(self.group.rank()) // self.etp_size

    @property
    def etp_rank(self) -> int:
        """Where this rank is along the cells."""
        return int(self.group.rank()) % self.etp_size

    @property
    def num_local_blocks(self) -> int:
        """Blocks of which this rank holds cells."""
        return self.num_blocks // self.ep_size

    @property
    def num_local_cells(self) -> int:
        """Cells of each of them that this rank holds."""
        return self.block_size // self.etp_size

    @property
    def first_block(self) -> int:
        """The first of them."""
        return self.ep_rank * self.num_local_blocks

    def levels(self) -> tuple[ExpertGrid, ExpertGrid]:
        """The two exchanges of a grid on several nodes: across nodes, then within the own one.

        Across, a node is one rank that holds all blocks of its ranks. Within, the blocks of the
        node, counted from its first, lie on its ranks.
        """
        assert self.node_groups is not None, "the grid is on one node"
        across, within = self.node_groups
        nodes = across.size()
        return (
            replace(self, group=across, ep_size=nodes, etp_size=1, node_groups=None),
            replace(
                self,
                group=within,
                ep_size=self.ep_size // nodes,
                num_blocks=self.num_blocks // nodes,
                node_groups=None,
            ),
        )

    def local_cells(self, cells: Tensor) -> Tensor:
        """Of numbers of all cells `[B, G, ...]` those of this rank, `[B / ep, G / etp, ...]`."""
        cells = cells.narrow(0, self.first_block, self.num_local_blocks)
        return cells.narrow(1, self.etp_rank * self.num_local_cells, self.num_local_cells)

    def parts(self, local: Tensor) -> Tensor:
        """`[B / ep_size, ...]` of this rank as `[B, etp_size, ...]` of all, everywhere.

        Differentiable: a rank gets back what all ranks' uses of its part give.
        """
        everywhere = gather_rows(local, self.group)
        grid = (self.ep_size, self.etp_size, self.num_local_blocks)
        return everywhere.view(*grid, *local.shape[1:]).transpose(1, 2).flatten(0, 1)

    def sum_over_cells(self, local: Tensor) -> Tensor:
        """`[B / ep_size, ...]` sums over this rank's cells as `[B, ...]` over all, everywhere.

        The parts are added in one order, so that every rank has the same bits.
        """
        return self.parts(local).sum(dim=1)


@cache
class OneRankGroup:
    """What the layer and Megatron ask of a process group, of a process that is in none."""

    def size(self) -> int:
        """Ranks."""
        return 1

    def rank(self) -> int:
        """This one."""
        return 0


def gather_rows(rows: Tensor, group: Any) -> Tensor:
    """The rows of all ranks of a group, in their order; its backward sums over the ranks."""
    if group.size() == 1:
        return rows  # also where torch.distributed is not initialised
    gathered: Tensor = gather_from_sequence_parallel_region(rows, group=group)
    return gathered


def one_rank_groups() -> ProcessGroupCollection:
    """Megatron's process groups of a layer, for a process without torch.distributed."""
    names = ("tp", "cp", "ep", "expt_tp", "expt_dp", "tp_ep", "tp_cp", "tp_dp_cp")
    return ProcessGroupCollection(**{name: OneRankGroup() for name in names})


def _node_groups(group: Any, node_size: int) -> tuple[Any, Any] | None:
    """The groups of `ExpertGrid.node_groups`, made once for all layers; None on one node.

    All ranks of the grid call this together. Neighbours in Megatron's order lie on one node.
    """
    if num_nodes(group.size(), node_size) == 1:
        return None
    ranks = torch.distributed.get_process_group_ranks(group)
    node, place = divmod(group.rank(), node_size)
    members = ranks[node * node_size : (node + 1) * node_size], ranks[place::node_size]
    within, across = (
        torch.distributed.new_group(each, use_local_synchronization=True) for each in members
    )
    return across, within
