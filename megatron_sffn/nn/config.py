"""The sparse layer's numbers and rules; no tensors.

Inputs: block size g, expansion E, active cells k, and a router's config. Outputs: a frozen config
whose derived numbers (B blocks, K active blocks, M cells) everything else reads.

Letters in the whole package: T tokens on this rank, D hidden size, M memory cells, B blocks,
G cells of a block (g on the command line), K active blocks per token, R rows after the exchange,
L numbers of a latent row.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from megatron_sffn.nn.router_config import RouterConfig, flag
from megatron_sffn.utils.errors import ConfigError

if TYPE_CHECKING:
    import torch

__all__ = [
    "Backend",
    "ConfigError",
    "RouterConfig",
    "SparseFFNConfig",
    "flag",
]


INITIALIZATIONS = {
    "megatron": "--init-method-std, values divided by sqrt(2·layers), as Megatron's MLP",
    "sigma-moe": "std sqrt(2/(layers·D)) and, over all M cells, sqrt(2/(layers·M)) "
    "(arXiv 2310.10837)",
    "sigma-moe-block": "the same, but values sqrt(2/(layers·g)): the paper's ablation",
    "pkm": "values N(0, 1/D) (Lample et al. 2019), keys as megatron",
}
"""Value of `--sffn-init` -> how keys and values are initialised."""


REGATHER = {
    "auto": "where a rank gets at least twice as many rows as it has tokens",
    "on": "always",
    "off": "never",
}
"""Value of `--sffn-regather` -> when the backward pass gathers the rows of other ranks again."""


class Backend(StrEnum):
    """The implementation that computes the blocks."""

    AUTO = "auto"
    """The fastest of our backends for the tensors' device."""
    NAIVE = "naive"
    """The oracle: every block for every token, then a mask."""
    TORCH = "torch"
    """A loop over blocks of torch matrix products, on any device."""
    GROUPED = "grouped"
    """A library's grouped GEMM with a group per block: for blocks of a multiple of 8 cells."""
    MASKED = "masked"
    """Dense products of all rows with all cells, then a mask of the chosen cells: for small E."""
    BAGS = "bags"
    """A library's embedding bags: for single cells that have values alone."""
    QUACK = "quack"
    """The grouped GEMM of the package quack-kernels, which gathers rows by index."""
    CPU = "cpu"
    """C++ kernels, compiled on this machine; the torch backend where there is no compiler."""
    TRITON = "triton"
    """Triton kernels for a GPU, in fp32, bf16 and fp16."""
    MEGATRON = "megatron"
    """Megatron's own dispatcher and experts with our router: the second oracle."""


@dataclass(frozen=True, kw_only=True)
class SparseFFNConfig:
    """One sparse feed-forward layer: M = E·k cells in B = M/g blocks, K = k/g of them per token.

    Args:
        active_cells: k, cells that a token uses; the width of the dense FFN of equal compute.
        router: the selection method with its settings.
        block_size: g, cells of a block, from 1 (a single memory cell) to k (a whole expert).
        expansion: E, memory cells over active cells.
        shared_blocks: S, how many of the k/g active blocks are the same for every token. They are
            further cells, not among the M cells.
        backend: implementation that computes the blocks.
        initialization: initialisation of keys and values (`--sffn-init`); None for the router's
            default.
        seed: seed of the initial values, which do not depend on the layout.
        regather: key of `REGATHER`: when the backward pass gathers the rows of other ranks again
            instead of keeping them.
        node_size: ranks of a node, if tokens cross to each node once (`alltoall` only); 0 to send
            tokens straight to each rank.
        exchange_chunks: number of chunks in which a rank's tokens are sent, one after the other,
            while the blocks compute the previous chunk (`alltoall` only).
        latent_size: L, numbers of the rows that blocks read and write (`--moe-latent-size`): tokens
            are projected to them before the dispatch, and their sums back to D after it; None for
            rows of D numbers.
        other_routers: (i, router) of each sparse layer of the model, counted from 0, that has
            another router than `router`; empty in the config of a single layer.
        layers_per_table: number of consecutive sparse layers that have one table of keys and values
            (`--sffn-layers-per-table`), each with a router of its own.

    Raises:
        ConfigError: if g does not divide k, a number is out of its range, or the router is not
            defined for them.
    """

    active_cells: int
    router: RouterConfig
    block_size: int = 256
    expansion: int = 16
    shared_blocks: int = 0
    backend: Backend = Backend.AUTO
    initialization: str | None = None
    seed: int = 1234
    regather: str = "auto"
    node_size: int = 0
    exchange_chunks: int = 1
    latent_size: int | None = None
    other_routers: tuple[tuple[int, RouterConfig], ...] = ()
    layers_per_table: int = 1

    def __post_init__(self) -> None:
        """Check every field, then whether the routers are defined for the layer."""
        if self.backend not in list(Backend):
            raise ConfigError(
                f"--sffn-backend {self.backend} is unknown; choose from {', '.join(Backend)}"
            )
        object.__setattr__(self, "backend", Backend(self.backend))
        self._check_sizes()
        self._check_settings()
        self._check_latent_size()
        self.router.check(self)
        for _, router in self.other_routers:
            self.with_router(router)

    def _check_sizes(self) -> None:
        """Refuse numbers of cells and blocks that do not fit each other."""
        for name, value in (
            ("--sffn-active-cells", self.active_cells),
            ("--sffn-block-size", self.block_size),
            ("--sffn-expansion", self.expansion),
        ):
            if value < 1:
                raise ConfigError(f"{name} {value} must be at least 1; give a positive number")
        if self.active_cells % self.block_size:
            raise ConfigError(
                f"--sffn-block-size {self.block_size} does not divide --sffn-active-cells "
                f"{self.active_cells}; {nearest_divisors(self.active_cells, self.block_size)}"
            )
        blocks = self.active_cells // self.block_size
        if not 0 <= self.shared_blocks < blocks:
            raise ConfigError(
                f"--sffn-shared-blocks {self.shared_blocks} is not from 0 to {blocks - 1}; of the "
                f"{blocks} active blocks of a token (--sffn-active-cells / --sffn-block-size) at "
                "least one must be chosen"
            )

    def _check_settings(self) -> None:
        """Refuse values of the other fields that are unknown or out of range."""
        if self.initialization not in (None, *INITIALIZATIONS):
            raise ConfigError(
                f"--sffn-init {self.initialization} is unknown; choose from "
                f"{', '.join(INITIALIZATIONS)}"
            )
        if self.regather not in REGATHER:
            raise ConfigError(
                f"--sffn-regather {self.regather} is unknown; choose from {', '.join(REGATHER)}"
            )
        if self.node_size < 0:
            raise ConfigError(
                f"--sffn-node-size {self.node_size} is negative; give the ranks of a node, or 0 to "
                "send tokens straight to each rank"
            )
        if self.exchange_chunks < 1:
            raise ConfigError(
                f"--sffn-exchange-chunks {self.exchange_chunks} must be at least 1; give 1 to send "
                "all tokens of a microbatch at once"
            )
        if self.layers_per_table < 1:
            raise ConfigError(
                f"--sffn-layers-per-table {self.layers_per_table} must be at least 1; leave it out "
                "for a table of keys and values in each sparse layer"
            )
        if self.layers_per_table > 1 and self.backend is Backend.MEGATRON:
            raise ConfigError(
                f"--sffn-layers-per-table {self.layers_per_table} is not available with "
                "--sffn-backend megatron, whose experts belong to a layer; use another "
                "--sffn-backend"
            )

    def _check_latent_size(self) -> None:
        """Refuse latent rows that are empty, or that nothing would read or could compute."""
        flag = f"--moe-latent-size {self.latent_size}"
        if self.latent_size is None:
            return
        if self.latent_size < 1:
            raise ConfigError(f"{flag} must be at least 1; leave it out for rows of --hidden-size")
        if not self.router.key_width(self.latent_size):
            raise ConfigError(
                f"{flag} is the width of rows that meet keys, and --sffn-router {self.router.name} "
                "has values alone; leave it out, or use --sffn-router avg-k"
            )
        if self.backend is Backend.MEGATRON:
            raise ConfigError(
                f"{flag} is not available with --sffn-backend {self.backend}, for which Megatron "
                "needs Transformer Engine; use another --sffn-backend"
            )

    def with_router(self, router: RouterConfig) -> SparseFFNConfig:
        """The config of a layer with this router."""
        return dataclasses.replace(self, router=router, other_routers=())

    def of_layer(self, index: int) -> SparseFFNConfig:
        """The config of one sparse layer.

        Args:
            index: counted over the model's sparse layers from 0.
        """
        if not self.other_routers:
            return self
        return self.with_router(dict(self.other_routers).get(index, self.router))

    def layers_by_router(self, num_layers: int) -> list[tuple[SparseFFNConfig, int]]:
        """The config of each router's layers, and how many there are; `router` comes first.

        Args:
            num_layers: number of sparse layers.
        """
        counts = Counter(router for _, router in self.other_routers)
        layers = [(self.with_router(router), count) for router, count in counts.items()]
        return [(self.with_router(self.router), num_layers - len(self.other_routers)), *layers]

    @property
    def routers(self) -> list[RouterConfig]:
        """The routers of the model, each once; `router` comes first."""
        return list(dict.fromkeys([self.router, *(router for _, router in self.other_routers)]))

    @property
    def token_keys(self) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """`token_keys` of the router that reads the input ids; None if no router reads them."""
        return next((router.token_keys for router in self.routers if router.needs_token_ids), None)

    def row_width(self, hidden_size: int) -> int:
        """Width of the rows that blocks read and write: L in a latent layer, else D."""
        return self.latent_size or hidden_size

    def key_width(self, hidden_size: int) -> int:
        """Width of a cell's key; 0 where blocks have values alone."""
        return self.router.key_width(self.row_width(hidden_size))

    def router_width(self, hidden_size: int) -> int:
        """Width of what the router scores: the blocks' rows, or the tokens."""
        return self.row_width(hidden_size) if self.router.scores_rows else hidden_size

    @property
    def num_cells(self) -> int:
        """M, all cells without those of shared blocks."""
        return self.expansion * self.active_cells

    @property
    def num_blocks(self) -> int:
        """B, all blocks without the shared ones."""
        return self.num_cells // self.block_size

    @property
    def num_active_blocks(self) -> int:
        """K, blocks that are chosen for a token."""
        return self.active_cells // self.block_size - self.shared_blocks

    @property
    def chosen_cells(self) -> int:
        """K·g, cells of the blocks that are chosen for a token."""
        return self.num_active_blocks * self.block_size

    @property
    def shared_cells(self) -> int:
        """S·g, cells that every token uses."""
        return self.shared_blocks * self.block_size


def nearest_divisors(number: int, target: int) -> str:
    """A remedy: the divisors of `number` next to `target`, below and above."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    below = [d for d in divisors if d < target][-1:]
    above = [d for d in divisors if d > target][:1]
    return "the nearest that does: " + " or ".join(map(str, below + above))
