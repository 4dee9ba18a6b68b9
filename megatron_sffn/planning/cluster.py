"""The cluster that a plan is for: cards, nodes, links, and the fractions of them that a run gets.

Inputs: the name of a card and numbers that replace its own. Outputs: a `Cluster`, from which the
time model reads seconds per FLOP and per byte.

Design notes
- Bandwidths are bytes per second that one card sends, in one direction.
- The ranks of a group that share a node also share its network cards, so that a ring over nodes
  with m members per node moves m times the bytes of one network card (NCCL's multiple rings).
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sffn.utils.errors import ConfigError

GB, TFLOP = 10**9, 10**12


@dataclass(frozen=True, kw_only=True)
class Card:
    """A GPU and its links, by the data sheet.

    Args:
        peak_flops: dense bf16 FLOP/s of the tensor cores.
        memory: bytes.
        memory_bandwidth: bytes per second of the card's own memory.
        node_bandwidth: bytes per second to the other cards of the node, in one direction.
        network_bandwidth: bytes per second to other nodes, in one direction.
    """

    peak_flops: float
    memory: float
    memory_bandwidth: float
    node_bandwidth: float
    network_bandwidth: float


# Data sheets count NVLink in both directions, and mostly FLOP/s with sparsity; here are one
# direction and dense FLOP/s. docs/planning.md says which number was checked against which source.
CARDS = {
    # A100 80GB SXM; DGX A100: one HDR InfiniBand card of 200 Gb/s for each GPU.
    "a100": Card(
        peak_flops=312 * TFLOP,
        memory=80 * GB,
        memory_bandwidth=2039 * GB,
        node_bandwidth=300 * GB,
        network_bandwidth=25 * GB,
    ),
    # H100 SXM; DGX H100: one NDR InfiniBand card of 400 Gb/s for each GPU.
    "h100": Card(
        peak_flops=989 * TFLOP,
        memory=80 * GB,
        memory_bandwidth=3350 * GB,
        node_bandwidth=450 * GB,
        network_bandwidth=50 * GB,
    ),
    # H200 SXM, an H100 with other memory; DGX H200: 400 Gb/s for each GPU.
    "h200": Card(
        peak_flops=989 * TFLOP,
        memory=141 * GB,
        memory_bandwidth=4800 * GB,
        node_bandwidth=450 * GB,
        network_bandwidth=50 * GB,
    ),
    # An eighth of a DGX B200, whose GPUs have 180 GB; ConnectX-7 of 400 Gb/s for each GPU.
    "b200": Card(
        peak_flops=2250 * TFLOP,
        memory=180 * GB,
        memory_bandwidth=8000 * GB,
        node_bandwidth=900 * GB,
        network_bandwidth=50 * GB,
    ),
}
"""Value of `--gpu` -> the card."""

EFFICIENCY = 0.73
"""Achieved over peak FLOP/s of large dense products: assumed, 720 of 989 TFLOP/s on Hopper."""

LINK_EFFICIENCY = 0.8
"""Achieved over nominal bytes per second of collectives with large messages: assumed."""

MEMORY_EFFICIENCY = 0.9
"""Achieved over nominal bytes per second of the card's memory: assumed."""

MEMORY_RESERVE = 0.1
"""Part of the memory that the closed forms do not count: CUDA, NCCL, scratch, fragmentation."""

COLLECTIVE_LATENCY = 2e-5
"""Seconds of a collective beside its bytes: assumed."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """GPUs in nodes.

    Args:
        gpus: number of all GPUs.
        gpus_per_node: number of GPUs of a node.
        card: the GPU and its links.
        efficiency: achieved over peak FLOP/s of large dense products.
        price: of a GPU hour, in any currency; None if it is not known.
        block_ratio: measured time of the block products of a sparse layer over those of a dense one
            with as many active cells; None to derive it.

    Raises:
        ConfigError: if a number is out of its range.
    """

    gpus: int
    gpus_per_node: int
    card: Card
    efficiency: float = EFFICIENCY
    price: float | None = None
    block_ratio: float | None = None

    def __post_init__(self) -> None:
        for name, count in (("--gpus", self.gpus), ("--gpus-per-node", self.gpus_per_node)):
            if count < 1:
                raise ConfigError(f"{name} {count} must be at least 1; give a positive number")
        if self.gpus > self.gpus_per_node and self.gpus % self.gpus_per_node:
            whole = self.gpus // self.gpus_per_node * self.gpus_per_node
            raise ConfigError(
                f"--gpus {self.gpus} is not a multiple of --gpus-per-node {self.gpus_per_node}; "
                f"use {whole} or {whole + self.gpus_per_node}"
            )
        if not 0 < self.efficiency <= 1:
            raise ConfigError(
                f"--efficiency {self.efficiency:g} is not above 0 and at most 1; give the achieved "
                "over the peak FLOP/s of a large dense product"
            )
        if self.price is not None and not 0 <= self.price < float("inf"):
            raise ConfigError(
                f"--price {self.price:g} is not a price; give that of a GPU hour, at least 0"
            )
        for name, value in (
            ("--block-ratio", 1.0 if self.block_ratio is None else self.block_ratio),
            ("--peak-flops", self.card.peak_flops),
            ("--gpu-memory", self.card.memory),
            ("--memory-bandwidth", self.card.memory_bandwidth),
            ("--node-bandwidth", self.card.node_bandwidth),
            ("--network-bandwidth", self.card.network_bandwidth),
        ):
            if not 0 < value < float("inf"):
                raise ConfigError(f"{name} {value:g} is not above 0; give a positive number")

    @property
    def usable_memory(self) -> float:
        """Bytes of a GPU that the counted memory may fill."""
        return self.card.memory * (1 - MEMORY_RESERVE)

    @property
    def flops(self) -> float:
        """FLOP/s of a GPU in large dense products."""
        return self.card.peak_flops * self.efficiency

    @property
    def memory_bytes(self) -> float:
        """Bytes per second that a kernel moves in the GPU's memory."""
        return self.card.memory_bandwidth * MEMORY_EFFICIENCY

    @property
    def node_bytes(self) -> float:
        """Bytes per second that a GPU sends within its node."""
        return self.card.node_bandwidth * LINK_EFFICIENCY

    @property
    def network_bytes(self) -> float:
        """Bytes per second that a GPU sends to other nodes."""
        return self.card.network_bandwidth * LINK_EFFICIENCY

    def leaves_node(self, size: int, stride: int = 1) -> bool:
        """True if a group of `size` ranks, each `stride` after the one before, spans nodes."""
        return size > 1 and size * stride > self.gpus_per_node

    def ring_bytes(self, size: int, stride: int = 1) -> float:
        """Bytes per second that a rank of such a group sends in a ring."""
        if not self.leaves_node(size, stride):
            return self.node_bytes
        members = max(1, self.gpus_per_node // stride)
        return min(self.node_bytes, members * self.network_bytes)
