"""Product keys: the best of B = n² keys for the price of 2n (Lample et al. 2019, arXiv 1907.05242).

Inputs: tokens `[T, D]`. Outputs: blocks and their factors. A head splits its query in two halves
and scores each half against n sub-keys; the score of block `i·n + j` is the sum of the two. The
best knn of all n² sums are among the knn·knn sums of the best knn of each half, also with ties: a
block outside them has at least knn blocks before it that are no worse. K = heads · knn.

In most of the methods the factor is the coefficient of a cell: blocks then have one cell, which has
a value and no key.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, override

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_sffn.nn.config import RouterConfig, SparseFFNConfig, flag
from megatron_sffn.nn.routers.base import Router, Routing, score_dtype
from megatron_sffn.nn.saved_bytes import FP32, INT64, LayerCall, SavedBytes
from megatron_sffn.utils.errors import ConfigError

NORM_EPSILON = 1e-6
"""Added to the mean square of a query or key before it is normalised."""


@dataclass(frozen=True, kw_only=True)
class ProductKeysConfig(RouterConfig):
    """Settings of every method with product keys."""

    values_alone: ClassVar[bool] = True
    """True if scores are the coefficients of cells, so that blocks have one cell and no key."""

    key_size: int = flag(
        "--sffn-product-key-size",
        default=256,
        least=2,
        help="numbers of a product key and its query, half of them for each table (pkm, pkm-relu, "
        "pkm-ffn, memory-plus, peer)",
    )
    key_norm: bool = flag(
        "--sffn-product-key-norm",
        default=False,
        help="normalise product keys and their queries before they are multiplied, with a learned "
        "factor per number (pkm, pkm-relu, pkm-ffn, memory-plus, peer)",
    )

    @property
    def num_heads(self) -> int:
        """Heads: queries of a token."""
        return 1

    @property
    def query_bias(self) -> bool:
        """True if the query has a bias."""
        return False

    @property
    @override
    def gated_output(self) -> bool:
        return True  # the gates are the cells' coefficients

    @override
    def key_width(self, hidden_size: int) -> int:
        return 0 if self.values_alone else hidden_size

    @override
    def check(self, sffn: SparseFFNConfig) -> None:
        if self.values_alone and sffn.block_size != 1:
            raise ConfigError(
                f"--sffn-router {self.name} has a score for every cell, not for blocks of "
                f"--sffn-block-size {sffn.block_size}; use --sffn-block-size 1"
            )
        if self.key_size % 2:
            raise ConfigError(
                f"--sffn-product-key-size {self.key_size} is cut in two halves; use "
                f"{self.key_size - 1} or {self.key_size + 1}"
            )
        if sffn.num_active_blocks % self.num_heads:
            raise ConfigError(
                f"--sffn-pkm-heads {self.num_heads} does not divide the {sffn.num_active_blocks} "
                f"active {_unit(sffn)}, of which every head chooses as many; change one of them"
            )
        _check_square(self.name, sffn)

    def weights(self, sffn: SparseFFNConfig, hidden_size: int) -> dict[str, tuple[int, ...]]:
        """Weights of queries and sub-keys."""
        heads, queries = self.num_heads, self.num_heads * self.key_size
        bias = {"query_bias": (queries,)} if self.query_bias else {}
        norm = {"query_norm": (self.key_size // 2,)} if self.key_norm else {}
        return {
            "query": (queries, hidden_size),
            "subkeys": (heads, 2, math.isqrt(sffn.num_blocks), self.key_size // 2),
            **bias,
            **norm,
        }

    def flops(self, sffn: SparseFFNConfig, hidden_size: int, *, gated: bool) -> int:
        """FLOPs of the queries, and of both halves against their sub-keys."""
        return 2 * self.num_heads * self.key_size * (hidden_size + math.isqrt(sffn.num_blocks))

    @override
    def saved_bytes(self, call: LayerCall) -> SavedBytes:
        heads, side = self.num_heads, math.isqrt(call.sffn.num_blocks)
        blocks_per_head = call.sffn.num_active_blocks // heads
        query_and_scores = FP32 * (self.key_size + 2 * side)
        # Row, column, and the input or output of the factor's function.
        per_block = 2 * INT64 + FP32
        fp32_subkeys = heads * self.key_size * side * FP32 if call.layout.half_precision else 0
        per_token = heads * (query_and_scores + blocks_per_head * per_block)
        count = fp32_subkeys + call.tokens * per_token
        if self.key_norm:
            count += self._saved_by_norm(call, side)
        return SavedBytes(bytes=count, tokens=True)

    def _saved_by_norm(self, call: LayerCall, side: int) -> int:
        """Bytes that the norm of queries and sub-keys keeps, beside its outputs.

        A GPU has one kernel for a norm, which keeps its input and the reciprocal norms. On a CPU
        the norm is composed, and the factor of the queries keeps the normalised queries.
        """
        queries, keys = call.tokens * self.num_heads, self.num_heads * side
        copies = 1 if call.cuda else 2
        count = queries * (copies * self.key_size + 2) + keys * (self.key_size + 2)
        factor = self.key_size // 2 if call.layout.half_precision else 0
        return FP32 * (count + factor)


def _unit(sffn: SparseFFNConfig) -> str:
    """What a head chooses, in words."""
    return "cells" if sffn.block_size == 1 else "blocks"


def _check_square(name: str, sffn: SparseFFNConfig) -> None:
    """Refuse a B that is not a square, with the nearest expansions for which it is."""
    blocks, active = sffn.num_blocks, sffn.active_cells // sffn.block_size
    if math.isqrt(blocks) ** 2 == blocks:
        return
    # E·k/g is a square if and only if E is the square-free part of k/g times a square.
    least = next(e for e in range(1, active + 1) if math.isqrt(e * active) ** 2 == e * active)
    below = math.isqrt(sffn.expansion // least)
    nearest = [str(least * root**2) for root in (below, below + 1) if root]
    divided = "" if sffn.block_size == 1 else f" / --sffn-block-size {sffn.block_size}"
    raise ConfigError(
        f"--sffn-router {name} needs a square number of {_unit(sffn)}, not {blocks} "
        f"(--sffn-expansion {sffn.expansion} · --sffn-active-cells {sffn.active_cells}{divided}); "
        f"the nearest --sffn-expansion that gives one: {' or '.join(nearest)}"
    )


class ProductKeysRouter(Router):
    """Choose the best blocks of each head. Arguments as `Router`."""

    settings: ProductKeysConfig

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        assert isinstance(self.sffn.router, ProductKeysConfig)
        self.settings = self.sffn.router
        self.blocks_per_head = self.sffn.num_active_blocks // self.settings.num_heads
        self.query = self.new_weight("query")
        self.query_bias = self.new_weight("query_bias") if self.settings.query_bias else None
        self.subkeys = self.new_weight("subkeys")
        self.query_norm = self.new_weight("query_norm") if self.settings.key_norm else None
        self.side = self.subkeys.shape[2]

    @override
    def draw(self, name: str, weight: Tensor) -> None:
        if name == "query_norm":
            # Each half of a score then starts with variance 1.
            weight.fill_(1 / math.sqrt(len(weight)))
        else:
            super().draw(name, weight)

    def coefficients(self, scores: Tensor) -> Tensor:
        """From scores `[T, heads, knn]` of the chosen blocks to the factors of their outputs."""
        raise NotImplementedError

    @override
    def forward(
        self,
        x: Tensor,
        keys: Tensor | None,
        token_ids: Tensor | None = None,
        num_sequences: int = 1,
    ) -> Routing:
        dtype, (heads, _, side, half) = score_dtype(x), self.subkeys.shape
        queries = F.linear(x, self.query, self.query_bias).view(-1, heads, 2, half).to(dtype)
        subkeys = self.subkeys.to(dtype)
        if self.query_norm is not None:
            queries = F.rms_norm(queries, (half,), self.query_norm.to(dtype), NORM_EPSILON)
            subkeys = F.rms_norm(subkeys, (half,), eps=NORM_EPSILON)
        # [heads · 2, T, n]: two products per head.
        scores = torch.einsum("thpc,hpnc->thpn", queries, subkeys)
        self.flag_not_finite(scores)
        ids = self.topk(scores.detach().reshape(-1, side), min(self.blocks_per_head, side))
        ids = ids.view(*scores.shape[:3], -1)
        first, second = self._best_sums(scores.detach().gather(3, ids))
        # Rows and columns of the chosen blocks: only their scores stay for the backward pass.
        rows, columns = ids[:, :, 0].gather(2, first), ids[:, :, 1].gather(2, second)
        sums = scores[:, :, 0].gather(2, rows) + scores[:, :, 1].gather(2, columns)
        return Routing(
            block_ids=(rows * side + columns).flatten(1),
            gates=self.coefficients(sums).flatten(1),
            queries=x[:, :0] if self.settings.values_alone else None,
            scores=sums.detach().flatten(1),
        )

    def _best_sums(self, best: Tensor) -> tuple[Tensor, Tensor]:
        """The pairs of largest sum among the best scores of both halves, `[T, heads, 2, knn]`.

        Returns:
            `[T, heads, knn]` indices into the first half, and into the second half.
        """
        sums = best[:, :, 0, :, None] + best[:, :, 1, None, :]
        chosen = self.topk(sums.flatten(0, 1).flatten(1), self.blocks_per_head)
        chosen = chosen.view(*sums.shape[:2], self.blocks_per_head)
        return chosen // sums.shape[3], chosen % sums.shape[3]
