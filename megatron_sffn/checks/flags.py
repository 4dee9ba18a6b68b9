"""Flags that are missing, out of range, or without an effect under the chosen router."""

from __future__ import annotations

import dataclasses
import math
from argparse import Namespace
from typing import Any

from megatron_sffn.flags.megatron_flags import ACTIVATIONS, DENSE_ONLY, DERIVED, LAYER
from megatron_sffn.flags.names import dest_of, flag_of, typed
from megatron_sffn.flags.sffn_flags import router_flags
from megatron_sffn.nn.routers import ROUTERS
from megatron_sffn.utils.errors import ConfigError

REQUIRED = ("num_layers", "hidden_size", "num_attention_heads")
"""Flags (dest) without which there is no model."""


DIVISORS = (
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
"""Flags (dest) that divide something, here or in Megatron."""


def check_megatron_flags(args: Namespace, given: list[str]) -> None:
    """Megatron's flags fit the router, before anything is derived from them.

    Args:
        args: not validated yet.
        given: those of `unset_flags` that are on the command line.

    Raises:
        ConfigError: if one does not.
    """
    for dest in DIVISORS:
        value = getattr(args, dest)
        if value is None and dest in REQUIRED:
            raise ConfigError(
                f"{flag_of(dest)} is missing; every model needs it, for example {flag_of(dest)} 8"
            )
        if value is not None and value < 1:
            raise ConfigError(f"{flag_of(dest)} {value} must be at least 1; give a positive number")
    activations = [flag_of(dest) for dest in ACTIVATIONS if getattr(args, dest)]
    if len(activations) > 1:
        raise ConfigError(f"{' and '.join(activations)} contradict each other; leave one")
    for dest, value in vars(args).items():
        numbers = value if isinstance(value, list) else [value]
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            raise ConfigError(f"{typed(flag_of(dest), value)} is not a finite number; give one")
    for dest in given:
        _check_moe_flag(args.sffn_router, dest, getattr(args, dest))


def _check_moe_flag(router: str, dest: str, value: Any) -> None:
    """One flag that was given has an effect."""
    text, dense = typed(flag_of(dest), value), router == "dense"
    if dest == "moe_router_dtype" and value == "fp64" and not dense:
        raise ConfigError(f"{text} is not available: sparse layers score in fp32; leave it out")
    if dest in LAYER or value == "none" or (dense and dest in DENSE_ONLY):
        return
    if dest in DERIVED and dense:
        raise ConfigError(
            f"{text} contradicts --sffn-router dense; for Megatron's own experts use "
            "--sffn-router switch --sffn-backend megatron"
        )
    if dest in DERIVED:
        raise ConfigError(f"{text} follows from the --sffn flags ({DERIVED[dest]}); leave it out")
    others = [name for name, config in ROUTERS.items() if dest in config.megatron_flags]
    if not others:
        raise ConfigError(f"{text} is not available with --sffn-router {router}; leave it out")
    if router not in others and value not in (0, [0], ["none"]):
        raise ConfigError(
            f"{text} has nothing to act on with --sffn-router {router}; leave it out, or use "
            f"--sffn-router {', '.join(others)}"
        )


def check_router_flags(args: Namespace) -> None:
    """The router has every router flag that was set.

    Raises:
        ConfigError: if one belongs to other routers.
    """
    known = [item.metadata["flag"] for item in dataclasses.fields(ROUTERS[args.sffn_router])]
    for option, item in router_flags().items():
        value = getattr(args, dest_of(option))
        if option not in known and value != item.default:
            raise ConfigError(
                f"{typed(option, value)} has nothing to act on: --sffn-router {args.sffn_router} "
                "does not have it; leave it out"
            )


def check_evaluation(args: Namespace) -> None:
    """An evaluation reads what the flags say.

    Raises:
        ConfigError: if a flag contradicts another, or is out of range.
    """
    if args.multiple_validation_sets and not args.full_validation:
        raise ConfigError(
            "--multiple-validation-sets needs --full-validation, since Megatron counts no batches "
            "of a single set; add it"
        )
    if args.full_validation and args.sffn_validation_data == "next":
        raise ConfigError(
            "--sffn-validation-data next has nothing to act on with --full-validation, which reads "
            "all of the validation set; leave one out"
        )
    if args.full_validation and args.mock_data:
        raise ConfigError(
            "--full-validation has no end with --mock-data; give --eval-iters instead, or data"
        )
    if args.eval_iters < 0:
        raise ConfigError(
            f"--eval-iters {args.eval_iters} must be at least 0; 0 leaves evaluations out"
        )
    if args.eval_interval is not None and args.eval_interval < 1:
        raise ConfigError(
            f"--eval-interval {args.eval_interval} must be at least 1; leave it out to evaluate "
            "after training alone"
        )
