"""Bytes that a router keeps for the backward, for each kind of router.

Enters: a router's config and the numbers of the call. Leaves: bytes, and whether the tokens
themselves are among what it keeps. A router that is not named here keeps nothing, as one does that
passes no gradient.

Choice: `functools.singledispatch` over the config classes: a method that keeps what its base does
needs no line here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import singledispatch

from megatron_sffn.nn.config import RouterConfig, SparseFFNConfig
from megatron_sffn.nn.routers.avg_k import AvgKConfig
from megatron_sffn.nn.routers.learned import LearnedConfig
from megatron_sffn.nn.routers.lorkm import LoRKMConfig
from megatron_sffn.nn.routers.noisy_top_k import NoisyTopKConfig
from megatron_sffn.nn.routers.product_keys import ProductKeysConfig
from megatron_sffn.nn.routers.scored import ScoredConfig
from megatron_sffn.nn.routers.vanilla_m import KeyTableConfig

FP32 = 4
"""Scores are in fp32 whatever the model is."""
INT32, INT64 = 4, 8
BALANCE = {"aux_loss", "seq_aux_loss", "global_aux_loss"}
"""Losses of the blocks' frequencies."""
KEY_COPIES = {"subset": 0, "learned": 1, "norm-weighted": 2}
"""Descriptors of weighted keys -> fp32 copies of half-precision keys that they keep."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of a sparse layer on one rank.

    Args:
        sffn: the layer.
        hidden_size: D.
        tokens: T.
        ranks: over which the blocks and cells are cut.
        number_bytes: of an activation.
        activation: name of the nonlinearity.
        losses: Megatron's balance losses that are on.
        router_groups: see `Exchange`.
        router_group_topk: see `Exchange`.
        cuda: whether scores are computed on a GPU, and `auto` is chosen for one.
    """

    sffn: SparseFFNConfig
    hidden_size: int
    tokens: int
    ranks: int
    number_bytes: int
    activation: str
    losses: frozenset[str]
    router_groups: int = 1
    router_group_topk: int = 1
    cuda: bool = False

    @property
    def half(self) -> bool:
        """Whether fp32 copies are copies."""
        return self.number_bytes < FP32

    @property
    def raises(self) -> bool:
        """Whether scores keep fp32 copies of half-precision operands: on a CPU."""
        return self.half and not self.cuda

    @property
    def keys_per_cell(self) -> int:
        """Two for a gated activation."""
        return 2 if self.activation == "swiglu" else 1

    def losses_of(self, router: ScoredConfig) -> frozenset[str]:
        """Those that are on, with the router's own."""
        return self.losses | ({"entropy_loss"} if router.entropy_coefficient else set())

    def differentiates(self, router: ScoredConfig) -> bool:
        """Whether a gradient passes through the scores."""
        return router.gated_output or bool(self.losses_of(router))


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What stays for the backward: `bytes`, and the layer's input where `tokens`."""

    bytes: int = 0
    tokens: bool = False


def kept_by_router(call: Call) -> Kept:
    """What the router of a layer keeps, without its queries, which are the rows that meet keys."""
    return _kept(call.sffn.router, call)


@singledispatch
def _kept(router: RouterConfig, call: Call) -> Kept:
    return Kept()


@_kept.register
def _(router: ScoredConfig, call: Call) -> Kept:
    if not call.differentiates(router):
        # A projection has a gradient from the cells that it meets, not only from the scores.
        return Kept(tokens=isinstance(router, LoRKMConfig))
    scores = _scores(router, call)
    bytes_ = scores.bytes + call.tokens * _gates_and_losses(router, call)
    losses = call.losses_of(router)
    # Of each loss numbers of the blocks: their frequencies; for the entropy its three factors. And
    # the sum of all losses.
    per_block = len(losses & BALANCE) + (3 if "entropy_loss" in losses else 0)
    bytes_ += FP32 * (per_block * call.sffn.num_blocks + bool(losses))
    return Kept(bytes=bytes_, tokens=scores.tokens)


@_kept.register
def _(router: ProductKeysConfig, call: Call) -> Kept:
    heads, size, side = router.num_heads, router.key_size, math.isqrt(call.sffn.num_cells)
    each = call.sffn.num_active_blocks // heads
    halves = FP32 * (size + 2 * side)
    # A row, a column, and the coefficient's input or output.
    chosen = each * (2 * INT64 + FP32)
    # The sub-keys in fp32.
    copies = heads * size * side * FP32 if call.half else 0
    return Kept(bytes=copies + call.tokens * heads * (halves + chosen), tokens=True)


def _gates_and_losses(router: ScoredConfig, call: Call) -> int:
    """Per token: what makes gates and losses of the scores."""
    blocks, active = call.sffn.num_blocks, call.sffn.num_active_blocks
    losses = call.losses_of(router)
    count = 0
    if router.gate != "none":
        count += active * INT64
    if router.gate == "softmax":
        count += FP32 * blocks
    of_chosen = router.gate in ("sigmoid", "softmax-chosen")
    if of_chosen:
        count += FP32 * active
    if of_chosen or "z_loss" in losses:
        count += FP32 * blocks
    if "z_loss" in losses:
        count += FP32
    if losses - {"z_loss"}:
        count += FP32 * blocks
    return count


@singledispatch
def _scores(router: ScoredConfig, call: Call) -> Kept:
    raise NotImplementedError(type(router).__name__)


@_scores.register
def _(router: AvgKConfig, call: Call) -> Kept:
    blocks, width = call.sffn.num_blocks, call.hidden_size
    bytes_ = blocks * width * FP32
    if router.descriptor == "max-norm":
        bytes_ += 4 * blocks * INT64  # which cell of which block, on a rank and over ranks
    if router.descriptor in KEY_COPIES:
        # Weighted sums and their weights, and the keys in fp32.
        numbers = call.sffn.num_cells // call.ranks
        numbers *= 1 + (KEY_COPIES[router.descriptor] * width if call.half else 0)
        bytes_ += FP32 * (numbers + blocks * (width + 2))
    if call.raises:
        bytes_ += call.tokens * call.hidden_size * FP32
    return Kept(bytes=bytes_, tokens=not call.raises)


@_scores.register
def _(router: LearnedConfig, call: Call) -> Kept:
    numbers = 0
    if router.network != "linear":
        twice = router.network == "mlp" and router.network_activation == "gelu"
        numbers = router.width(call.hidden_size) * (2 if twice else 1)
    return Kept(bytes=call.tokens * numbers * FP32, tokens=True)


@_scores.register
def _(router: NoisyTopKConfig, call: Call) -> Kept:
    # The spread before its softplus, and the noise.
    noise = call.tokens * 2 * call.sffn.num_blocks * FP32
    without = _scores.dispatch(LearnedConfig)(router, call)
    return Kept(bytes=without.bytes + noise, tokens=True)


@_scores.register
def _(router: KeyTableConfig, call: Call) -> Kept:
    sffn, width = call.sffn, router.key_width(call.hidden_size)
    # All cells are scored; of rows from every rank, by a part of the cells.
    cells = {"gelu": 1, "relu": 1, "squared_relu": 1, "swiglu": 3}[call.activation]
    if router.aggregation != "mean" and call.activation != "relu":
        cells += 1
    numbers = cells * sffn.num_cells
    if router.aggregation in ("max", "min"):
        numbers += sffn.num_blocks
    bytes_ = call.tokens * numbers * FP32
    copied = call.raises or call.ranks > 1
    if copied:
        bytes_ += call.tokens * call.ranks * width * (FP32 if call.raises else call.number_bytes)
    if call.raises:
        bytes_ += call.keys_per_cell * sffn.num_cells * width * FP32 // call.ranks
    low_rank = isinstance(router, LoRKMConfig)
    return Kept(bytes=bytes_, tokens=low_rank or not copied)
