"""Gives keys, values and gates parameter groups with a learning rate and weight decay of their own.

Inputs: `--sffn-lr-mult` and `--sffn-wd-mult`. Outputs: overrides of Megatron's parameter groups.

Design notes:
- Megatron puts weights with equal overrides into one group, of any optimizer. Each group that a
  flag names becomes one, with the label `GROUP`. It exists even where the factor is 1, so that a
  checkpoint fits a run with other factors.
- Megatron's override of a rate is a number. The factors multiply the rates of the finished groups,
  so that they also act on rates that follow from `--use-mup`.
- Vectors, such as the bias of product keys' queries, have no weight decay in Megatron, and get none
  here. They are a group of their own.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import Any

from megatron.core.optimizer import ParamKey
from megatron.core.optimizer.optimizer_config import ParamWithNamePredicate
from torch.nn.parameter import Parameter

from megatron_sffn.flags.param_groups import GROUPS, lr_factors, wd_factors
from megatron_sffn.patches.optimizer import GROUP, RATES
from megatron_sffn.patches.registry import apply
from megatron_sffn.patches.run_hooks import PARAM_GROUPS

NAMES = {
    "keys": r"experts\.(keys|local_experts\.\d+\.linear_fc1\.weight)",
    "values": r"experts\.(values|local_experts\.\d+\.linear_fc2\.weight)",
    "gates": r"router\..+",
}
"""Group -> pattern of the names of its weights in the MLP slot of a layer."""

VECTORS = " (vectors)"
"""End of the label of a group's vectors."""


def install(args: Namespace) -> None:
    """Let Megatron build the parameter groups of this run; a later run installs its own."""
    rates, decays = lr_factors(args), wd_factors(args)
    apply(PARAM_GROUPS, partial(_with_factors, rates, decays))


def remark(args: Namespace) -> str | None:
    """What the flags do, to be said before the first step; None without them or without a rate."""
    rates, decays = lr_factors(args), wd_factors(args)
    if args.lr is None:
        return None
    settings = []
    for group in GROUPS:
        rate, decay = rates.get(group, 1), decays.get(group, 1)
        if group in rates or group in decays:
            settings.append(
                f"{group}: learning rate {rate * args.lr:g}, weight decay "
                f"{decay * args.end_weight_decay:g}"
            )
    if not settings:
        return None
    others = f"other weights: {args.lr:g} and {args.end_weight_decay:g}"
    return "; ".join([*settings, others])


def _with_factors(
    rates: dict[str, float], decays: dict[str, float], original: Callable[..., Any]
) -> Callable[..., Any]:
    """Megatron's function that builds parameter groups, with groups for keys, values and gates."""

    def param_groups(model_chunks: Any, config: Any, config_overrides: Any) -> Any:
        overrides = {**(config_overrides or {}), **_overrides(rates, decays)}
        groups = original(model_chunks, config, overrides)
        for group in groups:
            factor = rates.get(group.get(GROUP, "").removesuffix(VECTORS), 1)
            if factor == 1:
                continue
            group["default_config"] = False  # it is not the rate in the log
            for rate in RATES:
                if group[rate] is not None:
                    group[rate] *= factor
        return groups

    return param_groups


def _overrides(rates: dict[str, float], decays: dict[str, float]) -> dict[ParamKey, Any]:
    """A label for the weights of each group that is named, and the factor of its weight decay."""
    overrides: dict[ParamKey, Any] = {}
    for group in [group for group in GROUPS if group in rates or group in decays]:
        matrices: dict[str, Any] = {GROUP: group}
        if group in decays:
            matrices["wd_mult"] = decays[group]
        vectors = {GROUP: f"{group}{VECTORS}"}
        for override, has_vectors in ((matrices, False), (vectors, True)):
            matches = partial(_belongs, NAMES[group], has_vectors)
            predicate = ParamWithNamePredicate(name=override[GROUP], fn=matches)
            overrides[ParamKey(with_name_predicate=predicate)] = override
    return overrides


def _belongs(names: str, has_vectors: bool, parameter: Parameter, name: str) -> bool:
    """True for a weight with such a name that is a vector, or is none."""
    return (parameter.dim() == 1) is has_vectors and bool(re.search(rf"\.mlp\.{names}$", name))
