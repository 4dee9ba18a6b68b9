"""Sparse layers in float64 with the same weights on any layout, and their results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from torch import Tensor

from megatron_sffn.nn.config import Backend, SparseFFNConfig
from megatron_sffn.nn.layer import layer_class
from megatron_sffn.nn.routers import ROUTERS
from megatron_sffn.nn.transformer_config import SparseFFNTransformerConfig

S, BATCH, D, VOCAB = 6, 4, 8, 50
SPARSE = [name for name in ROUTERS if name != "dense"]
WHOLE_KEYS = [name for name in SPARSE if ROUTERS[name]().key_width(D) == D]
"""Routers with keys of width D, which Megatron's experts can hold too."""
SINGLE_CELLS = [name for name in SPARSE if ROUTERS[name].test_numbers.single_cells]
"""Routers whose blocks are single cells, which cannot be split over ranks."""
FLOAT64 = {"params_dtype": torch.float64, "moe_router_dtype": "fp64"}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A layer to build.

    Args:
        router: name.
        block_size: g; k = 16 and E = 3, so that B = 48 / g. None for 4, or for 1 where the router
            has no other.
        expansion: E; None for 3, or for 16 where M must be a square.
        backend: of the blocks.
        swiglu: True for SwiGLU, False for GELU.
        options: fields of the router's config.
        megatron: fields of Megatron's config.
        sffn: other fields of the layer's config.
        training: True for training, False for evaluation.
    """

    router: str
    block_size: int | None = None
    expansion: int | None = None
    backend: Backend = Backend.AUTO
    swiglu: bool = False
    options: tuple[tuple[str, Any], ...] = ()
    megatron: tuple[tuple[str, Any], ...] = ()
    sffn: tuple[tuple[str, Any], ...] = ()
    training: bool = True


def config_of(case: Case) -> SparseFFNTransformerConfig:
    """Megatron's config of a case on the layout of this process."""
    activation = {"activation_func": F.silu, "gated_linear_unit": True} if case.swiglu else {}
    balance = {"moe_router_load_balancing_type": "none"}
    if case.router == "switch":
        balance = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.01}
    test_numbers = ROUTERS[case.router].test_numbers
    numbers = test_numbers.layer(active_cells=16, block_size=4, expansion=3)
    sizes = {"block_size": case.block_size, "expansion": case.expansion}
    tensor_parallel = parallel_state.get_tensor_model_parallel_world_size()
    return SparseFFNTransformerConfig(
        num_layers=2,
        hidden_size=D,
        num_attention_heads=2,
        add_bias_linear=False,
        tensor_model_parallel_size=tensor_parallel,
        sequence_parallel=tensor_parallel > 1,
        expert_model_parallel_size=parallel_state.get_expert_model_parallel_world_size(),
        expert_tensor_parallel_size=parallel_state.get_expert_tensor_parallel_world_size(),
        # Large enough that a wrong term shows.
        init_method_std=0.5,
        sffn=SparseFFNConfig(
            router=ROUTERS[case.router](**{**test_numbers.options, **dict(case.options)}),
            backend=case.backend,
            **numbers | {name: number for name, number in sizes.items() if number},
            **dict(case.sffn),
        ),
        **{**FLOAT64, **activation, **balance, **dict(case.megatron)},
    )


def build(case: Case) -> Any:
    """The layer of a case, as Megatron would build layer 1."""
    layer = layer_class(case.backend)(config_of(case), layer_number=1)
    for seed, (_, weight) in enumerate(layer.router.named_parameters(), start=99):
        with torch.no_grad():
            weight.copy_(draw(seed, *weight.shape) * 0.5)
    return layer


def draw(seed: int, *shape: int) -> Tensor:
    """Normal random numbers, the same on every rank."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states `[S, BATCH, D]`, input ids `[BATCH, S]`, and the factors of a linear loss."""
    ids = torch.randint(VOCAB, (BATCH, S), generator=torch.Generator().manual_seed(3))
    return draw(1, S, BATCH, D), ids, draw(2, S, BATCH, D)


def run(case: Case, ids: Tensor | None = None) -> dict[str, Tensor]:
    """Forward and backward pass of a layer on this rank's slice of the inputs.

    Args:
        case: the layer.
        ids: input ids `[BATCH, S]`; None for those of `inputs`.

    Returns:
        Whole tensors on every rank: `y` and `dx` `[S, BATCH, D]`, and the gradients of the block
        weights, the router's weights and latent projections, summed over ranks.
    """
    layer = build(case).train(case.training)
    hidden, default_ids, weights = inputs()
    ids = default_ids if ids is None else ids
    samples = _local_slice(BATCH, parallel_state.get_data_parallel_group())
    # Sequence parallelism splits s over TP ranks; ids stay whole, the layer splits them itself.
    positions = _local_slice(S, parallel_state.get_tensor_model_parallel_group())
    x = hidden[positions, samples].clone().requires_grad_()
    y, bias = layer(x, padding_mask=ids[samples])
    assert bias is None
    (y * weights[positions, samples]).sum().backward()
    result = {"y": _gather_whole(y.detach()), "dx": _gather_whole(x.grad)}
    replicas = parallel_state.get_expert_data_parallel_group()
    for name, table in tables(layer).items():
        grad = table.grad.clone()
        torch.distributed.all_reduce(grad, group=replicas)
        grid = layer.experts.expert_grid
        shards = [torch.empty_like(grad) for _ in range(grid.num_ranks)]
        torch.distributed.all_gather(shards, grad, group=grid.group)
        # From [ep, etp, B / ep, keys of a cell, G / etp, D] to [B, keys of a cell, G, D].
        width = grad.shape[2]
        shape = (grid.ep_size, grid.etp_size, len(grad), -1, grid.num_local_cells, width)
        table = torch.stack(shards).view(shape).permute(0, 2, 3, 1, 4, 5)
        result[f"d{name}"] = table.reshape(grid.num_blocks, -1, width)
    for name, weight in layer.named_parameters():
        if name.startswith(("experts.", "shared_experts.")) or weight.grad is None:
            continue
        grad = weight.grad.clone()
        torch.distributed.all_reduce(grad)
        result[f"d{name}"] = grad
    return {name: value.clone() for name, value in result.items()}


@torch.no_grad()
def copy_tables(layer: Any, megatron_layer: Any) -> None:
    """Copy this rank's blocks of our layer into the experts of a layer of Megatron's."""
    for block, mlp in enumerate(megatron_layer.experts.local_experts):
        mlp.linear_fc1.weight.copy_(layer.experts.keys[block])
        # Megatron's second linear maps G cells to D: its weight is [D, G].
        mlp.linear_fc2.weight.copy_(layer.experts.values[block].T)


def tables(layer: Any) -> dict[str, Tensor]:
    """Keys and values of the blocks on this rank: leaves with gradients."""
    return dict(layer.experts.named_parameters())


def _local_slice(size: int, group: Any) -> slice:
    per_rank = size // group.size()
    return slice(group.rank() * per_rank, (group.rank() + 1) * per_rank)


def _gather_whole(shard: Tensor) -> Tensor:
    """Gather the shards of all ranks: TP ranks along s, DP ranks along the batch."""
    for group, dim in (
        (parallel_state.get_tensor_model_parallel_group(), 0),
        (parallel_state.get_data_parallel_group(), 1),
    ):
        shards = [torch.empty_like(shard.contiguous()) for _ in range(group.size())]
        torch.distributed.all_gather(shards, shard.contiguous(), group=group)
        shard = torch.cat(shards, dim=dim)
    return shard
