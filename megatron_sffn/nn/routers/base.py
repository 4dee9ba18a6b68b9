"""What a router promises: the record it returns, and how its own weights are drawn.

Enters: tokens `[T, D]` and this rank's keys. Leaves: a `Routing`, K block ids per token and, where
the method has them, gates. Never a tokens × blocks map: at g = 1 that map has 65,536 columns
(Megatron's own routers return one).
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.nn.parameter import Parameter

from megatron_sffn.nn.config import SparseFFNConfig, SparseFFNTransformerConfig
from megatron_sffn.nn.expert_grid import ExpertGrid
from megatron_sffn.ops import device
from megatron_sffn.ops.route_topk import route_topk
from megatron_sffn.utils.hashing import seed_of

NO_BLOCK = -1
"""The id in a place of `Routing.block_ids` that stays empty."""


@dataclass(frozen=True, kw_only=True)
class Routing:
    """The blocks of every token.

    Args:
        block_ids: `[T, K]` int64, of all B blocks, distinct within a row (of a head, where there
            are heads); -1 for a block that was dropped.
        gates: `[T, K]` factor of each block's output, or None where the method has none.
        queries: `[T, key width]` what meets the keys instead of the tokens; None for the tokens.
        scores: `[T, K]` of the chosen blocks, detached, for statistics; None if there are none.
        may_be_empty: False promises that no id is -1, so that nobody has to look for one, which
            would make the host wait for the device. It follows from flags alone.
    """

    block_ids: Tensor
    gates: Tensor | None = None
    queries: Tensor | None = None
    scores: Tensor | None = None
    may_be_empty: bool = False


class Router(torch.nn.Module):
    """Base of all routers.

    Args:
        config: of the model; its `sffn` holds the layer's numbers.
        pg_collection: Megatron's process groups; `tp_ep`, `ep` and `expt_tp` say where blocks are.
        is_mtp_layer: Megatron's; not used.
    """

    weights_version: Hashable | None = None
    """Which weights the keys hold: the same value promises the same weights, so that what follows
    from them alone is computed once; None promises nothing (see `layer.set_weights_version`)."""

    score_flag: Tensor
    """Scalar on the device: 0, and NaN for good once a score was NaN or infinite. `nan_check` looks
    at it once a step. Not a buffer: it has no place in a checkpoint, and half-precision models have
    their buffers narrowed."""

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
        """Megatron tells each layer its number, counted from 1, after it is built.

        The number seeds the router's own weights, which are the same on every rank and layout.
        """
        if layer_number == self.layer_number:
            return
        self.layer_number = layer_number
        if not self.config.perform_initialization:
            return
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            for name, parameter in self.named_parameters():
                seed = seed_of(self.sffn.seed, layer_number, "router", name)
                torch.default_generator.manual_seed(seed)
                drawn = torch.empty(parameter.shape)
                self.draw(name, drawn)
                parameter.copy_(drawn)

    def topk(self, scores: Tensor, count: int) -> Tensor:
        """`[T, count]` ids of the largest of `[T, n]` scores, by the layer's backend."""
        backend = self.sffn.backend
        return route_topk(scores, count, backend="auto" if backend == "megatron" else backend)

    def draw(self, name: str, weight: Tensor) -> None:
        """Fill a new fp32 weight of this name; Megatron's init method unless a router says else."""
        self.config.init_method(weight)

    def new_weight(self, name: str) -> Parameter:
        """An uninitialised weight that all ranks hold alike.

        Args:
            name: of those in `RouterConfig.weights`, which has its shape.
        """
        config = self.config
        shape = self.sffn.router.weights(self.sffn, config.hidden_size)[name]
        weight = Parameter(torch.empty(shape, dtype=config.params_dtype, device=device.current()))
        # Its gradient is summed over TP ranks, which have different tokens.
        weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return weight

    def forward(
        self, x: Tensor, keys: Tensor | None, token_ids: Tensor | None, num_sequences: int = 1
    ) -> Routing:
        """Choose K blocks for each token.

        Args:
            x: `[T, D]` tokens of this rank.
            keys: `[B / ep, G / etp, key width]` the keys held here; `[B / ep, 2G / etp, ...]`, gate
                keys first, for a gated activation; None for a memory of values alone.
            token_ids: `[T]` input ids, for routers that ask for them.
            num_sequences: whose tokens alternate in T, as in Megatron's `[s, b, D]`.

        Returns:
            K distinct blocks for each token, also where scores are NaN: `flag_not_finite` notes
            that, and the run ends with the step.
        """
        raise NotImplementedError

    @torch.no_grad()
    def flag_not_finite(self, scores: Tensor) -> None:
        """Note on the device whether a score is NaN or infinite: one pass, and no wait."""
        # 0 times a finite sum adds 0; 0 times NaN or infinity adds NaN, which stays.
        self.score_flag.add_(scores.detach().sum(), alpha=0.0)

    def end_step(self) -> None:
        """All microbatches of a step have run, on all ranks; the weights are about to change."""


def score_dtype(x: Tensor) -> torch.dtype:
    """Scores are at least fp32, so that a selection does not hang on a half-precision tie."""
    return torch.promote_types(x.dtype, torch.float32)
