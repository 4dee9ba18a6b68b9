"""Group-limited routing: all blocks of a token lie in a few groups of blocks (DeepSeek-V2, §2.1.2).

Inputs: selection scores `[T, B]`, and the values of `--moe-router-num-groups` and
`--moe-router-group-topk`. Outputs: a mask `[T, B]` of the blocks that a token may choose.

The B blocks are split into equal groups of consecutive blocks. A token chooses among the blocks of
its group_topk best groups. The score of a group is the sum of its K / group_topk largest scores:
Megatron's rule, except that ties go to the group of lowest index. With as many groups as the
expert-parallel group has ranks, or nodes, a token reaches at most group_topk of them.

With `--sffn-group-score mean`, which is ours, the score of a group is the mean of its scores. The
mean of Avg-K's scores is the Avg-K score of the group as one large block: a token then chooses
large blocks by their mean keys, and smaller blocks within them.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_sffn.utils.errors import ConfigError

GROUP_SCORES = ("largest", "mean")
"""Values of `--sffn-group-score`."""


def check_groups(config: TransformerConfig | Namespace, num_blocks: int, num_active: int) -> None:
    """Refuse numbers of groups that are not possible.

    Args:
        config: Megatron's or its arguments, with `moe_router_num_groups` and
            `moe_router_group_topk`.
        num_blocks: B.
        num_active: K, blocks that a token chooses.

    Raises:
        ConfigError: if one of the two is missing, groups do not divide the blocks, or the chosen
            groups do not divide the chosen blocks or cannot hold them.
    """
    groups, chosen = config.moe_router_num_groups, config.moe_router_group_topk
    if groups is None and chosen is None:
        return
    if groups is None or chosen is None:
        missing = "--moe-router-num-groups" if groups is None else "--moe-router-group-topk"
        raise ConfigError(f"group-limited routing needs {missing}, too; add it, or drop the other")
    if groups < 1 or num_blocks % groups:
        raise ConfigError(
            f"--moe-router-num-groups {groups} does not divide the {num_blocks} blocks; use a "
            "divisor, such as the expert-parallel size"
        )
    if not 1 <= chosen <= groups or num_active % chosen:
        raise ConfigError(
            f"--moe-router-group-topk {chosen} is not a divisor of the {num_active} blocks that a "
            f"token chooses, from 1 to --moe-router-num-groups {groups}; change it"
        )
    if num_active > chosen * (num_blocks // groups):
        raise ConfigError(
            f"--moe-router-group-topk {chosen} groups of {num_blocks // groups} blocks do not hold "
            f"the {num_active} blocks that a token chooses; choose more groups, or make fewer"
        )


def in_best_groups(
    selection_scores: Tensor,
    num_active: int,
    num_groups: int,
    group_topk: int,
    topk: Callable[[Tensor, int], Tensor],
    group_score: str = "largest",
) -> Tensor:
    """The blocks that each token may choose.

    Args:
        selection_scores: `[T, B]` scores by which blocks are chosen; -inf for one that is dropped.
        num_active: K.
        num_groups: number of equal groups of blocks.
        group_topk: groups of a token.
        topk: `(scores [T, n], count)` to ids `[T, count]` of the largest; ties go to the lowest id.
        group_score: one of `GROUP_SCORES`; the mean is over the blocks that are not dropped.

    Returns:
        `[T, B]` bool. The host does not wait for the device.
    """
    by_group = selection_scores.unflatten(1, (num_groups, -1))
    if group_score == "mean":
        group_scores = by_group.masked_fill(by_group.isneginf(), torch.nan).nanmean(dim=2)
        group_scores = group_scores.nan_to_num(nan=-torch.inf)
    else:
        group_scores = by_group.topk(num_active // group_topk, dim=2).values.sum(dim=2)
    allowed = torch.zeros_like(group_scores, dtype=torch.bool)
    allowed.scatter_(1, topk(group_scores, group_topk), True)
    return allowed[:, :, None].expand_as(by_group).flatten(1)
