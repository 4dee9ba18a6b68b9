"""RandHash: a fixed random map from the input token's id to K blocks (arXiv 2305.13999; HashLayer,
Roller et al. 2021). No parameter, no gate, no balance loss.

The K blocks of an id are K of B by a hash of the id, the layer and the seed (`hashing.py`): the map
is the same on every device and layout, and a checkpoint need not carry it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron_sffn.config import RouterConfig, flag
from megatron_sffn.hashing import hashed_subsets
from megatron_sffn.routers.base import Router, Routing


@dataclass(frozen=True, kw_only=True)
class RandHashConfig(RouterConfig):
    """Settings of RandHash."""

    name = "rand-hash"
    summary = "a fixed random set of blocks for every token id; selection costs nothing"

    needs_token_ids = True

    seed: int = flag("--sffn-hash-seed", default=42, help="seed of the map (rand-hash)")
    shared: bool = flag(
        "--sffn-hash-shared", default=False, help="the same map in all layers (rand-hash)"
    )

    def build(self) -> type[RandHashRouter]:
        """See `RouterConfig.build`."""
        return RandHashRouter


class RandHashRouter(Router):
    """Blocks by a keyed permutation of the token id."""

    def forward(
        self,
        x: Tensor,
        keys: Tensor | None,
        token_ids: Tensor | None = None,
        num_sequences: int = 1,
    ) -> Routing:
        """See `Router.forward`."""
        assert isinstance(self.sffn.router, RandHashConfig)
        assert token_ids is not None, (
            "rand-hash needs the input ids: give them to the layer (or Megatron's GPTModel) as "
            "`padding_mask`, the slot for numbers of a token that reaches every pipeline stage"
        )
        ids, position = token_ids.unique(return_inverse=True)
        layer = 0 if self.sffn.router.shared else self.layer_number
        assert layer is not None, "rand-hash needs the layer number"
        blocks = hashed_subsets(
            ids,
            size=self.sffn.num_blocks,
            count=self.sffn.num_active_blocks,
            key=self.sffn.router.seed * 1_000_003 + layer,
        )
        return Routing(block_ids=blocks[position])
