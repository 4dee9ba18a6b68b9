"""Changes of shape between a tensor of the checkpoint and those of transformers, both ways.

Inputs, outputs: tensors, and the numbers of the model that a reshape needs (`Sizes`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sffn.utils.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Numbers of a model that its reshapes need.

    Args:
        num_layers: number of layers.
        num_heads: attention heads.
        num_query_groups: heads of keys and values.
        num_blocks: B; 0 for a dense model.
        gated: whether the activation has a gate (SwiGLU).
    """

    num_layers: int
    num_heads: int
    num_query_groups: int
    num_blocks: int = 0
    gated: bool = False


@dataclass(frozen=True)
class Reshape:
    """A change of shape in both directions.

    Args:
        split: from the checkpoint's tensor to the architecture's.
        join: from the architecture's tensors to the checkpoint's.
    """

    split: Callable[[Tensor, Sizes], list[Tensor]]
    join: Callable[[list[Tensor], Sizes], Tensor]


def _split_qkv(qkv: Tensor, sizes: Sizes) -> list[Tensor]:
    """Megatron stores, for each query group, its query heads, its key head and its value head."""
    heads_per_group = sizes.num_heads // sizes.num_query_groups
    by_group = qkv.unflatten(0, (sizes.num_query_groups, heads_per_group + 2, -1))
    parts = by_group.split((heads_per_group, 1, 1), dim=1)
    return [part.flatten(0, 2) for part in parts]


def _join_qkv(parts: list[Tensor], sizes: Sizes) -> Tensor:
    heads_per_group = sizes.num_heads // sizes.num_query_groups
    heads = (heads_per_group, 1, 1)
    by_group = [
        part.unflatten(0, (sizes.num_query_groups, per_group, -1))
        for part, per_group in zip(parts, heads, strict=True)
    ]
    return torch.cat(by_group, dim=1).flatten(0, 2)


def _double_behind_half(values: Tensor, sizes: Sizes) -> list[Tensor]:
    """Qwen2-MoE multiplies shared experts by a sigmoid gate: a gate of zeros halves exactly."""
    return [values * 2, values.new_zeros(1, len(values))]


def _halve_behind_half(parts: list[Tensor], sizes: Sizes) -> Tensor:
    values, gate = parts
    if gate.any():
        raise ConfigError(
            "the shared expert has a learned gate, which shared blocks do not have; import a model "
            "without it"
        )
    return values / 2


def _halves(tensor: Tensor) -> list[Tensor]:
    """Gate rows and up rows; both are empty where there are none."""
    half = len(tensor) // 2
    return [tensor[:half], tensor[half:]]


RESHAPES: dict[str, Reshape] = {
    "same": Reshape(lambda x, _: [x], lambda parts, _: parts[0]),
    "qkv": Reshape(_split_qkv, _join_qkv),
    "halves": Reshape(lambda x, _: _halves(x), lambda parts, _: torch.cat(parts)),
    "blocks": Reshape(
        lambda x, sizes: list(x.chunk(sizes.num_blocks)), lambda parts, _: torch.cat(parts)
    ),
    "blocks, transposed": Reshape(
        lambda x, sizes: [block.T for block in x.chunk(sizes.num_blocks)],
        lambda parts, _: torch.cat([block.T for block in parts]),
    ),
    "behind a gate of one half": Reshape(_double_behind_half, _halve_behind_half),
}
"""Name -> reshape. `blocks` cuts a table of cells `[M, C]` into B blocks `[G, C]`; transposed, as
the second linear layer of an expert, `[C, G]`."""
