"""The base class of routers, and the record `Routing` that they return.

Inputs: tokens `[T, D]` and this rank's keys. Outputs: a `Routing`: K block ids per token and, where
the method has them, gates.

Design notes: a router never returns a dense map of tokens × blocks, as Megatron's own routers do:
at g = 1 the map has 65,536 columns.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.nn.parameter import Parameter

from megatron_sffn.nn.config import SparseFFNConfig
from megatron_sffn.nn.expert_grid import ExpertGrid
from megatron_sffn.nn.transformer_config import SparseFFNTransformerConfig
from megatron_sffn.ops import device
from megatron_sffn.ops.route_topk import route_topk
from megatron_sffn.utils.hashing import seed_of

NO_BLOCK = -1
"""The id of an empty slot of `Routing.block_ids`."""


@dataclass(frozen=True, kw_only=True)
class Routing:
    """The chosen blocks of every token.

    Args:
        block_ids: `[T, K]` int64 ids among all B blocks, distinct within a row (within a head's
            part of a row, where there are heads); -1 for a block that was dropped.
        gates: `[T, K]` factor of each block's output, or None where the method has none.
        queries: `[T, key width]` rows that are multiplied with the keys; None for the tokens.
        scores: `[T, K]` scores of the chosen blocks, detached, for statistics; None if there are
            none.
        may_be_empty: False guarantees that no id is -1, so that the host does not have to wait for
            the device to find out. It follows from flags alone.
    """

    block_ids: Tensor
    gates: Tensor | None = None
    queries: Tensor | None = None
    scores: Tensor | None = None
    may_be_empty: bool = False


class Router(torch.nn.Module):
    """Base of all routers.

    Args:
        config: config of the model; its `sffn` holds the layer's numbers.
        pg_collection: Megatron's process groups; `tp_ep`, `ep` and `expt_tp` say where blocks are.
        is_mtp_layer: part of Megatron's router interface; not used.
    """

    weights_version: Hashable | None = None
    """Version of the weights: values derived from weights alone are cached per version. None turns
    caching off (see `layer.set_weights_version`)."""

    score_flag: Tensor
    """Scalar on the device: 0 until a score is NaN or infinite, NaN ever after. `nan_check` reads
    it once per step. It is not a buffer: it does not belong in a checkpoint, and Megatron casts the
    buffers of half-precision models."""

    def __init__(
        self,
        *,
        config: SparseFFNTransformerConfig,
        pg_collection: ProcessGroupCollection,
        is_mtp_layer: bool = False,
    ) -> None:
        super().__init__()
        assert config.sffn is not None, "a router needs config.sffn"
        self.config = config
        self.sffn: SparseFFNConfig = config.sffn
        self.expert_grid = ExpertGrid.of(pg_collection, config.sffn)
        self.layer_number: int | None = None
        self.score_flag = torch.zeros((), device=device.current())

    def set_layer_number(self, layer_number: int) -> None:
        """Take the layer's number, which Megatron sets after the layer is built, and init weights.

        The number, which counts from 1, seeds the router's own weights: they are the same on every
        rank and layout, and in a GPT and the hybrid model of the same layers.
        """
        layer_number = self.config.ffn_number(layer_number)
        if layer_number == self.layer_number:
            return
        self.layer_number = layer_number
        if not self.config.perform_initialization:
            return
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            for name, parameter in self.named_parameters():
                seed = seed_of(self.sffn.seed, layer_number, "router", name)
                torch.default_generator.manual_seed(seed)
                initial = torch.empty(parameter.shape)
                self.draw(name, initial)
                parameter.copy_(initial)

    def topk(self, scores: Tensor, count: int) -> Tensor:
        """Ids `[T, count]` of the largest of the scores `[T, n]`, by the layer's backend."""
        backend = self.sffn.backend
        return route_topk(scores, count, backend="auto" if backend == "megatron" else backend)

    def draw(self, name: str, weight: Tensor) -> None:
        """Init an fp32 weight in place; by Megatron's `init_method` unless overridden."""
        self.config.init_method(weight)

    def new_weight(self, name: str) -> Parameter:
        """An uninitialised weight that is replicated on all ranks.

        Args:
            name: a key of `RouterConfig.weights`, which has the shape.
        """
        config = self.config
        width = self.sffn.router_width(config.hidden_size)
        shape = self.sffn.router.weights(self.sffn, width)[name]
        weight = Parameter(torch.empty(shape, dtype=config.params_dtype, device=device.current()))
        # Under sequence parallelism TP ranks have different tokens: Megatron sums their gradients.
        weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return weight

    def forward(
        self, x: Tensor, keys: Tensor | None, token_ids: Tensor | None, num_sequences: int = 1
    ) -> Routing:
        """Choose K blocks for each token.

        Args:
            x: `[T, D]` tokens of this rank; `[T, L]` rows in a latent layer if the router's config
                has `scores_rows`.
            keys: `[B / ep, G / etp, key width]` keys of this rank; `[B / ep, 2G / etp, ...]`, gate
                keys first, for a gated activation; None where the blocks have values alone.
            token_ids: `[T]` input ids, for routers with `needs_token_ids`.
            num_sequences: b of Megatron's `[s, b, D]`; the tokens of b sequences alternate in T.

        Returns:
            K distinct blocks for each token, also where scores are NaN: then `flag_not_finite` sets
            the flag, and the run ends with the step.
        """
        raise NotImplementedError

    def project_sums(self, sums: Tensor, x: Tensor) -> Tensor:
        """The layer's update from the sums of the chosen blocks: the sums unless overridden.

        Args:
            sums: `[T, D]`, each token's gated sum.
            x: `[T, D]` tokens.
        """
        return sums

    @torch.no_grad()
    def flag_not_finite(self, scores: Tensor) -> None:
        """Set `score_flag` if a score is NaN or infinite, without waiting for the device."""
        # 0 times a finite sum adds 0; 0 times NaN or infinity adds NaN, which stays.
        self.score_flag.add_(scores.detach().sum(), alpha=0.0)

    def end_step(self) -> None:
        """Called on all ranks after the last microbatch of a step, before the optimizer step."""


def score_dtype(x: Tensor) -> torch.dtype:
    """The dtype of scores: at least fp32, so that half-precision ties do not decide a selection."""
    return torch.promote_types(x.dtype, torch.float32)
