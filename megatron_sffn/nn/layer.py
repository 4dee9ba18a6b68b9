"""The sparse feed-forward layer: route, dispatch, compute, combine.

Inputs: hidden states `[s, b, D]` in the MLP slot of a transformer layer. Outputs: their update, of
the same shape.

Design notes: both layers subclass Megatron's `MoELayer`, because recomputation, logging and
checkpoints test `isinstance(mlp, MoELayer)`. `SparseFFN` replaces its four steps by steps that
carry block ids in place of tokens × experts maps. `MegatronBackedFFN` replaces only the router, as
a second oracle.
"""

from __future__ import annotations

import dataclasses
import re
from abc import abstractmethod
from collections.abc import Hashable, Iterator
from functools import cached_property, partial
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import scatter_to_sequence_parallel_region
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from torch import Tensor

from megatron_sffn.nn.block_weights import BlockWeights
from megatron_sffn.nn.comm_volume import regathers
from megatron_sffn.nn.config import Backend, SparseFFNConfig
from megatron_sffn.nn.dispatch import DispatchedTokens, dispatch
from megatron_sffn.nn.expert_grid import one_rank_groups
from megatron_sffn.nn.latent_projection import LatentProjection
from megatron_sffn.nn.layer_pattern import prediction_layers
from megatron_sffn.nn.parallel_layout import ParallelLayout
from megatron_sffn.nn.routers.base import Routing
from megatron_sffn.nn.routing_counters import RoutingCounter, TrafficCounter
from megatron_sffn.nn.shared_tables import BorrowedBlockWeights, SharedTables
from megatron_sffn.nn.transformer_config import SparseFFNTransformerConfig
from megatron_sffn.ops import Activation
from megatron_sffn.ops.block_ffn import block_ffn_pairs, main_grad
from megatron_sffn.ops.streams import start_beside
from megatron_sffn.utils.errors import ConfigError


class _SparseLayer(MoELayer):
    """Base of both layers: the router slot, the counters, and how input ids reach the router.

    Args:
        config: config of the model, with `config.sffn` set.
        layer_number: counted from 1 over all pipeline stages; it seeds the initial weights, and
            says which router the layer has. Megatron may set it later where all layers have the
            same router. A layer without process groups takes 1 for None.
        pg_collection: Megatron's process groups; None for the global ones. If torch.distributed
            is not initialised, this process computes alone.
        is_mtp_layer: True in a multi-token-prediction head.
        name: Megatron's name of the module instance.
        tables: of the group of layers that have one table; None for a table of its own.
    """

    def __init__(
        self,
        config: SparseFFNTransformerConfig,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
        name: str | None = None,
        tables: SharedTables | None = None,
    ) -> None:
        first_layer = layers_before(config, is_mtp_layer, name)
        # A copy, whose `sffn` has the router of this layer alone.
        config = config.of_layer(None if first_layer else layer_number)
        sffn = config.sffn
        assert sffn is not None, "a sparse layer needs config.sffn"
        # No method of either paper has biases, so Megatron's router and experts get none either.
        config.add_bias_linear = False
        # Megatron would ask for Transformer Engine, of whose layers it builds the projections.
        config.moe_latent_size = None
        if pg_collection is None:
            # Used as a library: no model will set the layer number, which seeds the weights.
            layer_number = layer_number or 1
            pg_collection = _groups_of_this_process(sffn)
        super().__init__(
            config,
            MoESubmodules(
                experts=tables or self._experts_builder(),
                router=sffn.router.router_class(),
                shared_experts=partial(SharedExpertMLP, submodules=_linears()),
            ),
            layer_number=layer_number,
            pg_collection=pg_collection,
            is_mtp_layer=is_mtp_layer,
            name=name,
        )
        self._first_layer = first_layer
        self.activation = Activation.of(config)
        self.backend = sffn.backend
        self.trained = RoutingCounter(sffn.num_blocks)
        self.evaluated = RoutingCounter(sffn.num_blocks)
        self.traffic = TrafficCounter()
        self.fc1_latent_proj = self.fc2_latent_proj = None
        if sffn.latent_size is not None:
            self.fc1_latent_proj = LatentProjection(config, "down")
            self.fc2_latent_proj = LatentProjection(config, "up")
        if layer_number is not None and not is_mtp_layer:
            self.set_layer_number(layer_number)

    def set_layer_number(self, layer_number: int) -> None:
        """Take the layer's number, which seeds all weights.

        Megatron counts the layers of multi-token prediction from 1, in a hybrid model those of each
        prediction; here they follow the others.
        """
        super().set_layer_number(layer_number + self._first_layer)

    @staticmethod
    @abstractmethod
    def _experts_builder() -> Any:
        """Megatron's `ExpertsBuilder` for the layer's `experts` slot."""

    def forward(
        self,
        hidden_states: Tensor,
        intermediate_tensors: Any = None,
        padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Update the hidden states.

        Args:
            hidden_states: `[s, b, D]`; under sequence parallelism this rank's shard of s.
            intermediate_tensors: Megatron's CUDA-graph slot; must be None.
            padding_mask: the input ids `[b, s]`, for routers that hash them, or the numbers that
                `RouterConfig.token_keys` makes of whole sequences of ids. Pretraining has no
                padding, and Megatron passes this argument to the MLP of every pipeline stage and
                through recomputation. It shards it along s on the first stage only.

        Returns:
            `[s, b, D]`, and None for the bias.
        """
        assert intermediate_tensors is None, "partial CUDA graphs do not reach into sparse layers"
        token_ids = None
        if padding_mask is not None:
            token_ids = padding_mask.T.contiguous()
            if len(token_ids) != len(hidden_states):
                token_ids = scatter_to_sequence_parallel_region(token_ids, group=self.tp_group)
        if self.moe_layer_recompute and self.training:
            update = tensor_parallel.checkpoint(self._update, False, hidden_states, token_ids)
            return update, None
        return self._update(hidden_states, token_ids), None

    @abstractmethod
    def _update(self, hidden_states: Tensor, token_ids: Tensor | None) -> Tensor:
        """The update of hidden states `[s, b, D]`, with input ids `[s, b]` or None."""

    def _route(self, hidden_states: Tensor, keys: Tensor, token_ids: Tensor | None) -> Routing:
        """Route the s · b tokens of `[s, b, D]`, and count the routing."""
        ids_T = None if token_ids is None else token_ids.reshape(-1)
        _, num_sequences, width = hidden_states.shape
        x_TD = hidden_states.reshape(-1, width)
        routing: Routing = self.router(x_TD, keys, ids_T, num_sequences)
        if not self.training:
            self.evaluated(routing)
        elif torch.is_grad_enabled():
            self.trained(routing)
        return routing

    def _project_sums(self, sums: Tensor, hidden_states: Tensor) -> Tensor:
        """The update `[s, b, D]` from the sums of the chosen blocks."""
        width = hidden_states.shape[-1]
        x_TD, sums_TD = hidden_states.reshape(-1, width), sums.reshape(-1, width)
        update: Tensor = self.router.project_sums(sums_TD, x_TD)
        return update.view_as(hidden_states)


class SparseFFN(_SparseLayer):
    """A sparse feed-forward layer with blocks of any size and any router.

    Arguments: `config`, `layer_number`, `pg_collection`, `is_mtp_layer`, `name`, as Megatron passes
    them to the module in a layer's MLP slot, and `tables`.
    """

    experts: BlockWeights | BorrowedBlockWeights
    _initialised_as_layer: int | None = None

    @staticmethod
    def _experts_builder() -> Any:
        return BlockWeights

    def set_layer_number(self, layer_number: int) -> None:
        """Set the number that seeds all weights, and initialise those that are not the router's.

        Megatron calls it again after it has built the layer, usually with the same number.
        """
        super().set_layer_number(layer_number)
        if self._initialised_as_layer != self.layer_number:
            ffn_number = self.config.ffn_number(self.layer_number)
            self.experts.init_weights(ffn_number)
            for projection in (self.fc1_latent_proj, self.fc2_latent_proj):
                if projection is not None:
                    projection.init_weight(ffn_number)
            self._initialised_as_layer = self.layer_number

    @cached_property
    def _regathers(self) -> bool:
        """True if the backward pass sends the rows again instead of keeping them."""
        config, grid = self.config, self.experts.expert_grid
        layout = ParallelLayout(
            ep=grid.ep_size,
            etp=grid.etp_size,
            dispatcher=config.moe_token_dispatcher_type,
            router_groups=config.moe_router_num_groups or 1,
            router_group_topk=config.moe_router_group_topk or 1,
        )
        return regathers(config.sffn, config.hidden_size, layout)

    def _update(self, hidden_states: Tensor, token_ids: Tensor | None) -> Tensor:
        keys, values = self.experts()
        x_TC, routing = self._rows(hidden_states, main_grad.shared(keys), token_ids)
        # Shared blocks need no communication: a GPU computes them during the dispatch.
        shared = None
        if self.use_shared_expert:
            shared = start_beside(self.shared_experts_compute, hidden_states)
        plan = dispatch(
            x_TC,
            routing,
            self.experts.expert_grid,
            self.config.moe_token_dispatcher_type,
            regather=self._regathers,
            num_chunks=self.config.sffn.exchange_chunks,
        )
        self.traffic(len(x_TC), plan.bytes_sent)

        def compute(dispatched: DispatchedTokens) -> Tensor:
            tables = keys, values
            if not dispatched.is_first_chunk:
                # Later chunks use the same tables, without one more gradient placeholder each.
                tables = main_grad.further_use(keys), main_grad.further_use(values)
            return block_ffn_pairs(
                dispatched.rows,
                *tables,
                dispatched.pairs,
                dispatched.gates,
                activation=self.activation,
                backend=self.backend,
                rows_again=dispatched.regather,
            )

        sums_TC = plan.run(compute)
        if self.fc2_latent_proj is not None:
            sums_TC = self.fc2_latent_proj(sums_TC)
        update = self._project_sums(sums_TC, hidden_states)
        return update if shared is None else update + shared()

    def _rows(
        self, hidden_states: Tensor, keys: Tensor, token_ids: Tensor | None
    ) -> tuple[Tensor, Routing]:
        """The rows that blocks read, and their routing.

        Returns:
            The tokens `[T, D]`, or `[T, L]` in a latent layer. A router that scores with the
            blocks' keys scores these rows, any other the tokens.
        """
        project, scores_rows = self.fc1_latent_proj, self.config.sffn.router.scores_rows
        if project is not None and scores_rows:
            hidden_states = project(hidden_states)
        routing = self._route(hidden_states, keys, token_ids)
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        if project is not None and not scores_rows:
            # Queries are the tokens, with the auxiliary losses attached for the backward pass.
            rows = project(rows if routing.queries is None else routing.queries)
            routing = dataclasses.replace(routing, queries=None)
        return rows, routing


class MegatronBackedFFN(_SparseLayer):
    """A router of this package with Megatron's dispatcher and experts (`--sffn-backend megatron`).

    Megatron's dispatcher needs a dense map and sends a copy of a token per block, so this layer is
    for coarse blocks, as oracle and baseline. It has the arguments of `SparseFFN`.
    """

    @staticmethod
    def _experts_builder() -> Any:
        return partial(SequentialMLP, submodules=_linears())

    def _update(self, hidden_states: Tensor, token_ids: Tensor | None) -> Tensor:
        """Convert the routing to Megatron's dense `(probs, routing_map)`, and run its steps."""
        keys = torch.stack([mlp.linear_fc1.weight for mlp in self.experts.local_experts])
        routing = self._route(hidden_states, keys, token_ids)
        if routing.queries is not None:
            # These are the tokens, with the auxiliary losses attached for the backward pass.
            hidden_states = routing.queries.view_as(hidden_states)
        gates_TK, ids_TK = routing.gates, routing.block_ids
        if gates_TK is None:
            gates_TK = hidden_states.new_ones(ids_TK.shape)
        # Empty places, id -1, write to an additional first column, which is cut off.
        zeros = gates_TK.new_zeros(len(ids_TK), 1 + self.config.num_moe_experts)
        probs_TB = zeros.scatter(1, ids_TK + 1, gates_TK)[:, 1:]
        map_TB = zeros.bool().scatter(1, ids_TK + 1, True)[:, 1:]
        rows, probs = self.dispatch(*self.preprocess(hidden_states, probs_TB, map_TB))
        output, _ = self.routed_experts_compute(rows, probs)
        update = self._project_sums(self.postprocess(self.combine(output), None), hidden_states)
        shared = self.shared_experts_compute(hidden_states)
        return update if shared is None else update + shared


def setting_that_needs_groups(sffn: SparseFFNConfig) -> str | None:
    """The setting that makes a layer use Megatron's own modules, which need its process groups."""
    if sffn.shared_blocks:
        return f"shared_blocks={sffn.shared_blocks}"
    if sffn.backend is Backend.MEGATRON:
        return f"backend={sffn.backend.value!r}"
    return None


def _groups_of_this_process(sffn: SparseFFNConfig) -> ProcessGroupCollection | None:
    """Process groups of a layer that was given none: None for Megatron's global ones.

    Raises:
        ConfigError: if the layer needs Megatron's groups and they are not initialised.
    """
    if parallel_state.is_initialized():
        return None
    if torch.distributed.is_initialized():
        reason = "torch.distributed is initialised, but Megatron's process groups are not"
    elif setting := setting_that_needs_groups(sffn):
        reason = f"{setting} needs Megatron's process groups"
    else:
        return one_rank_groups()
    raise ConfigError(
        f"{reason}; call torch.distributed.init_process_group() and "
        "megatron.core.parallel_state.initialize_model_parallel() before the layer is made"
    )


def _linears() -> MLPSubmodules:
    """Megatron's linear layers for experts and shared blocks."""
    linear = LocalSpecProvider()
    return MLPSubmodules(
        linear_fc1=linear.column_parallel_linear(), linear_fc2=linear.row_parallel_linear()
    )


def layers_before(config: SparseFFNTransformerConfig, is_mtp_layer: bool, name: str | None) -> int:
    """Number of layers before the one that Megatron counts as 1.

    Args:
        config: config of the model.
        is_mtp_layer: True in the multi-token prediction of a GPT.
        name: Megatron's name of the layer, which says as much in a hybrid model.
    """
    prediction = re.search(r"\bmtp\.layers\.(\d+)\.", name or "")
    if config.hybrid_pattern is not None and prediction is not None:
        earlier = prediction_layers(config.hybrid_pattern)[: int(prediction[1]) - 1]
        return config.num_layers + sum(map(len, earlier))
    return config.num_layers if is_mtp_layer else 0


def layer_class(backend: Backend) -> type[_SparseLayer]:
    """The layer class of a backend."""
    return MegatronBackedFFN if backend is Backend.MEGATRON else SparseFFN


def sparse_layers(model: torch.nn.Module) -> Iterator[_SparseLayer]:
    """The sparse layers of a model or model chunk, in order."""
    return (module for module in model.modules() if isinstance(module, _SparseLayer))


def set_weights_version(model: torch.nn.Module, version: Hashable | None) -> None:
    """Tell the routers the version of the weights, so that they can cache per version.

    Values that a router derives from the weights alone, such as Avg-K's descriptors, are then
    computed once per version; without a version, in every forward pass.

    Args:
        model: the model or model chunk that is about to run forward.
        version: different after every optimizer step; None for no caching.
    """
    for layer in sparse_layers(model):
        layer.router.weights_version = version


def end_step(model: torch.nn.Module) -> None:
    """Tell the routers that all microbatches of a step have run, on all ranks.

    Args:
        model: the model or model chunk, before the optimizer step.
    """
    for layer in sparse_layers(model):
        layer.router.end_step()
