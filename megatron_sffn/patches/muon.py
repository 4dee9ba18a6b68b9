"""Names of Megatron 0.19 that let Muon train tables of blocks, each block as a matrix of its own.

Muon takes two-dimensional weights; everything else Megatron sends to the optimizer of embeddings
and norms (`--muon-scalar-optimizer`). A table `[B, G, D]` is three-dimensional, but each of its
blocks is a weight matrix `[G, D]`, as an expert's is.

Design notes:
- A table says with `block_matrices` how many matrices a block has: two for the keys of SwiGLU, gate
  keys first. Tables without it, whose rows are looked up one by one, stay with the embeddings.
- Newton-Schulz of emerging-optimizers is batched over the matrices. Two of Megatron's scales depend
  on which dimension is the output: that of keys is G, that of values D, so values are transposed.
- Expert tensor parallelism (ETP) splits the cells of a block: its ranks gather the momentum, each
  computes the whole matrices, and keeps its rows. All other layouts hold whole blocks.
- Large tables are computed some matrices at a time, since the iteration makes several copies.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_sffn.patches.registry import Patch, apply

MAX_NUMBERS = 2**26
"""Numbers of a table that are orthogonalised at a time: 256 MiB in fp32, and 4 to 5 such copies."""


def install() -> None:
    """Replace the names; idempotent.

    Raises:
        ConfigError: if a name does not exist.
    """
    for patch in PATCHES:
        apply(patch)


def _with_tables(original: dict[str, Any]) -> dict[str, Any]:
    """Megatron's table of optimizers, in which Muon takes tables of blocks too."""
    from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate

    muon = original["muon"]
    (key,), (override,) = zip(*muon.default_param_overrides.items(), strict=True)

    def is_for_scalar_optimizer(param: Tensor) -> bool:
        return not _has_block_matrices(param) and key.predicate(param)

    predicate = ParamPredicate(name=key.predicate.name, fn=is_for_scalar_optimizer)
    overrides = {ParamKey(predicate=predicate): override}
    return {**original, "muon": dataclasses.replace(muon, default_param_overrides=overrides)}


def _or_tables(original: Callable[[Tensor], bool]) -> Callable[[Tensor], bool]:
    """Count tables of blocks among the weights that Muon trains."""
    return lambda param: _has_block_matrices(param) or original(param)


def _has_block_matrices(param: Tensor) -> bool:
    return getattr(param, "block_matrices", 0) > 0


def _with_block_matrices(original: dict[str, Any]) -> dict[str, Any]:
    """The attributes that an fp32 master copy gets from its half-precision weight."""
    return {**original, "block_matrices": 0, "block_inputs_first": False}


def _per_block(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Orthogonalise each matrix of a table of blocks by itself."""

    def orthogonalize(self: Any, p: Any, grad: Tensor, **kwargs: Any) -> Tensor:
        if not _has_block_matrices(p):
            return original(self, p, grad, **kwargs)
        # [B / ep · matrices, G / etp, D]
        matrices = grad.unflatten(1, (p.block_matrices, -1)).flatten(0, 1)
        update = torch.empty_like(matrices)
        matrices_at_a_time = max(1, MAX_NUMBERS // matrices[0].numel())
        for momentum, result in zip(
            matrices.split(matrices_at_a_time), update.split(matrices_at_a_time), strict=True
        ):
            result.copy_(_orthogonalized(self, momentum, p.block_inputs_first))
        return update.view_as(grad)

    return orthogonalize


def _orthogonalized(optimizer: Any, momentum: Tensor, inputs_first: bool) -> Tensor:
    """Megatron's scaled update of this rank's rows `[N, G / etp, D]` of N matrices."""
    etp_group = optimizer.pg_collection.expt_tp
    if etp_group.size() > 1:
        rows_by_rank = [torch.empty_like(momentum) for _ in range(etp_group.size())]
        torch.distributed.all_gather(rows_by_rank, momentum, group=etp_group)
        momentum = torch.cat(rows_by_rank, dim=1)
    if inputs_first:
        update: Tensor = optimizer.scaled_orthogonalize_fn(momentum.mT, None).mT
    else:
        update = optimizer.scaled_orthogonalize_fn(momentum, None)
    return update.chunk(etp_group.size(), dim=1)[etp_group.rank()]


PATCHES = (
    Patch(
        target="megatron.core.optimizer._EMERGING_OPTIMIZERS",
        make=_with_tables,
        needed_by="megatron.core.optimizer._get_megatron_emerging_optimizer",
        why="Adam trains the tables of blocks, which are most of the model, and Muon the rest",
        until="Megatron asks a parameter whether it consists of matrices",
    ),
    Patch(
        target="megatron.core.optimizer.emerging_optimizers.TensorParallelMuon.orthogonalize",
        make=_per_block,
        needed_by="emerging_optimizers.orthogonalized_optimizers.OrthogonalizedOptimizer.step",
        why="under ETP Muon takes the rows of a block on one rank for the whole matrix",
        until="Megatron's Muon takes batches of matrices",
    ),
    Patch(
        target="megatron.core.optimizer.is_managed_by_layer_wise_optimizer",
        make=_or_tables,
        needed_by="megatron.core.optimizer.get_mup_config_overrides",
        why="with --use-mup tables get Adam's learning rate for wide layers, and others Muon's",
        until="Megatron asks a parameter whether it consists of matrices",
    ),
    Patch(
        target="megatron.core.optimizer.layer_wise_optimizer.is_managed_by_layer_wise_optimizer",
        make=_or_tables,
        needed_by="megatron.core.optimizer.layer_wise_optimizer.tag_params_for_buffer_routing",
        why="with --use-distributed-optimizer Megatron 0.20 gives no rank the state of a table",
        until="Megatron asks a parameter whether it consists of matrices",
    ),
    Patch(
        target="megatron.core.tensor_parallel.layers._MODEL_PARALLEL_ATTRIBUTE_DEFAULTS",
        make=_with_block_matrices,
        needed_by="megatron.core.tensor_parallel.layers.copy_tensor_model_parallel_attributes",
        why="the fp32 master copy of a table does not say how many matrices a block has",
        until="Megatron copies all attributes of a weight to its master copy",
    ),
)
