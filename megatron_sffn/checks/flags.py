"""Flags that are missing, out of range, or have no effect with the chosen router.

Inputs: the namespace of the command line, before anything is derived from it. MoE flags that were
not given are None in it (`flags.megatron_flags.unset_flags`).
"""

from __future__ import annotations

import dataclasses
import math
from argparse import Namespace
from collections.abc import Iterator, Sequence

from megatron_sffn.checks.problem import Problem
from megatron_sffn.flags.absent_features import reason_of_absence
from megatron_sffn.flags.megatron_flags import (
    ACTIVATIONS,
    DENSE_ONLY,
    DERIVED,
    LAYER,
    REPLACED,
    default_balance_coefficient,
    is_moe_flag,
    requested_balance_losses,
)
from megatron_sffn.flags.names import dest_of, flag_of
from megatron_sffn.flags.sffn_flags import ffn_hidden_size, router_flags
from megatron_sffn.nn.layer_routers import router_names
from megatron_sffn.nn.load_balancing import BALANCE_LOSSES
from megatron_sffn.nn.quantile_balancing import QUANTILE_BALANCING
from megatron_sffn.nn.routers import ROUTERS

REQUIRED = ("num_layers", "hidden_size", "num_attention_heads")
"""Flags (dest) without which there is no model."""

SIZES = (
    *REQUIRED,
    "ffn_hidden_size",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "micro_batch_size",
    "global_batch_size",
)
"""Flags (dest) that this package or Megatron divides by."""


def yaml_file(command: Sequence[str]) -> Iterator[Problem]:
    """A file in place of the command line."""
    if any(word.partition("=")[0] == "--yaml-cfg" for word in command):
        yield Problem(
            "--yaml-cfg",
            None,
            "is not available, since Megatron reads its file in place of this command line",
            "give the flags",
        )


def flags_of_other_routers(args: Namespace) -> Iterator[Problem]:
    """`--sffn-*` flags that the chosen router does not have."""
    flags_of_router = [
        field.metadata["flag"]
        for name in router_names(args.sffn_router)
        for field in dataclasses.fields(ROUTERS[name])
    ]
    for flag, field in router_flags().items():
        value = getattr(args, dest_of(flag))
        if flag not in flags_of_router and value != field.default:
            yield Problem(
                flag,
                value,
                f"has nothing to act on: --sffn-router {args.sffn_router} does not have it",
                "leave it out",
            )


def sizes(args: Namespace) -> Iterator[Problem]:
    """Sizes that are missing or less than 1."""
    for dest in SIZES:
        flag, value = flag_of(dest), getattr(args, dest)
        if value is None and dest in REQUIRED:
            remedy = f"every model needs it, for example {flag} 8"
            yield Problem(flag, None, "is missing", remedy)
        if value is not None and value < 1:
            yield Problem(flag, value, "must be at least 1", "give a positive number")


def activations(args: Namespace) -> Iterator[Problem]:
    """More than one activation, and clamps that leave nothing."""
    flags = [flag_of(dest) for dest in ACTIVATIONS if getattr(args, dest)]
    if len(flags) > 1:
        yield Problem(" and ".join(flags), None, "contradict each other", "leave one")
    clamp = args.activation_func_clamp_value
    if clamp is not None and clamp <= 0:
        remedy = "leave it out for no clamp; gpt-oss has 7"
        yield Problem("--activation-func-clamp-value", clamp, "must be greater than 0", remedy)


def finite_numbers(args: Namespace) -> Iterator[Problem]:
    """Numbers that are infinite or not a number."""
    for dest, value in vars(args).items():
        numbers = value if isinstance(value, list) else [value]
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            yield Problem(flag_of(dest), value, "is not a finite number", "give one")


def dense_width(args: Namespace) -> Iterator[Problem]:
    """Active cells of a dense model that differ from its width."""
    cells, width = args.sffn_active_cells, ffn_hidden_size(args)
    if args.sffn_router == "dense" and cells not in (None, width):
        yield Problem(
            "--sffn-active-cells",
            cells,
            f"differs from --ffn-hidden-size {width}, but --sffn-router dense has Megatron's MLP "
            "everywhere",
            f"set --ffn-hidden-size {cells}",
        )


def moe_flags(args: Namespace) -> Iterator[Problem]:
    """Megatron's MoE flags that the chosen router does not use."""
    for dest, value in vars(args).items():
        if is_moe_flag(dest) and value is not None:
            yield from _moe_flag(args.sffn_router, dest, value)


def _moe_flag(router: str, dest: str, value: object) -> Iterator[Problem]:
    """One MoE flag that was given.

    A flag that a later Megatron adds is refused as well, until somebody says what it does here.
    """
    flag, is_dense = flag_of(dest), router == "dense"
    if dest == "moe_router_dtype" and value == "fp64" and not is_dense:
        rule = "is not available: sparse layers score in fp32"
        yield Problem(flag, value, rule, "leave it out")
    if dest in LAYER or value == "none" or (is_dense and dest in DENSE_ONLY):
        return
    if dest in DERIVED and is_dense:
        yield Problem(
            flag,
            value,
            "contradicts --sffn-router dense",
            "for Megatron's own experts use --sffn-router switch --sffn-backend megatron",
        )
    if dest in DERIVED:
        rule = f"follows from the --sffn flags ({DERIVED[dest]})"
        yield Problem(flag, value, rule, "leave it out")
    routers = [name for name, config in ROUTERS.items() if dest in config.megatron_flags]
    if not routers:
        rule = f"is not available with --sffn-router {router}{_because(dest, is_dense)}"
        instead = REPLACED.get(dest, {}).get(str(value)) if not is_dense else None
        yield Problem(flag, value, rule, f"use {instead}" if instead else "leave it out")
    if not set(router_names(router)) & set(routers) and value not in (0, [0], ["none"]):
        yield Problem(
            flag,
            value,
            f"has nothing to act on with --sffn-router {router}",
            f"leave it out, or use --sffn-router {', '.join(routers)}",
        )


def _because(dest: str, is_dense: bool) -> str:
    """The reason for which sparse layers do not have a feature, as the end of a rule."""
    reason = None if is_dense else reason_of_absence(dest)
    return f": {reason}" if reason else ""


def balance_losses(args: Namespace) -> Iterator[Problem]:
    """Load-balancing losses that do not exist, or without a coefficient for each."""
    if args.sffn_router == "dense":
        return
    routers = [ROUTERS[name] for name in router_names(args.sffn_router)]
    by_prices = args.moe_router_load_balancing_type == [QUANTILE_BALANCING]
    if by_prices and any(args.moe_aux_loss_coeff or []):
        yield Problem(
            "--moe-aux-loss-coeff",
            args.moe_aux_loss_coeff,
            f"is for a loss, and --moe-router-load-balancing-type {QUANTILE_BALANCING} has none",
            "leave one of them out",
        )
    losses, coefficients = requested_balance_losses(args, routers)
    if not losses:
        return
    if set(losses) - set(BALANCE_LOSSES) or len(set(losses)) < len(losses):
        yield Problem(
            "--moe-router-load-balancing-type",
            losses,
            f"is not available with --sffn-router {args.sffn_router}",
            f"use none or {QUANTILE_BALANCING}, or each of {', '.join(BALANCE_LOSSES)} at most "
            "once",
        )
    if len(coefficients) != len(losses) or min(coefficients) < 0:
        yield Problem(
            "--moe-aux-loss-coeff",
            coefficients,
            f"is not a number of at least 0 for each of {', '.join(losses)}",
            f"leave it out for {default_balance_coefficient(routers)}",
        )


CHECKS = (
    flags_of_other_routers,
    sizes,
    activations,
    finite_numbers,
    dense_width,
    moe_flags,
    balance_losses,
)
