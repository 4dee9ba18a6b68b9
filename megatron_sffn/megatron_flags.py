"""Megatron's own flags under sparse layers: which follow from ours, which act, which are refused.

Enters: Megatron's namespace before validation. Leaves: the same one with its MoE flags derived from
the S-FFN numbers, or one sentence.

Choice: of Megatron's seventy MoE flags a few act on our layers. Any other that is given is an error
rather than ignored, also one that a later Megatron adds; to be able to tell, `unset_flags` makes
None the default of them all while the command line is read.
"""

from __future__ import annotations

import math
from argparse import ArgumentParser, Namespace
from typing import Any

from megatron_sffn.balance import BALANCE_LOSSES
from megatron_sffn.config import Backend, SparseFFNConfig, moe_fields
from megatron_sffn.errors import ConfigError
from megatron_sffn.layout import exchange_of
from megatron_sffn.model import layer_pattern
from megatron_sffn.routers import ROUTERS
from megatron_sffn.traffic import cheapest_dispatcher

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

ACTIVATIONS = ("swiglu", "squared_relu", "quick_geglu", "sffn_relu")
"""Flags (dest) that replace GELU."""

DERIVED = {
    "num_experts": "B = E·k/g",
    "moe_router_topk": "K = k/g",
    "moe_ffn_hidden_size": "--sffn-block-size",
    "moe_layer_freq": "--sffn-layers",
    "moe_shared_expert_intermediate_size": "--sffn-shared-blocks",
    "moe_router_pre_softmax": "always on",
}
"""MoE flags (dest) that follow from the S-FFN numbers -> how."""

LAYER = (
    "moe_router_dtype",
    "moe_token_dispatcher_type",
    "moe_layer_recompute",
    "moe_per_layer_logging",
)
"""MoE flags (dest) that act whatever the router is."""

DENSE_ONLY = (
    "activation_func_clamp_value",
    "cuda_graph_impl",
    "delay_wgrad_compute",
    "enable_cuda_graph",
    "external_cuda_graph",
    "fine_grained_activation_offloading",
    "glu_linear_offset",
    "heterogeneous_layers_config_encoded_json",
    "heterogeneous_layers_config_path",
    "hybrid_layer_pattern",
    "mtp_num_layers",
    "multi_latent_attention",
    "overlap_dispatch_backward_with_experts_wgrad",
    "overlap_moe_expert_parallel_comm",
    "quick_geglu",
    "save_tokens_per_expert_interval",
    "spec",
    "use_megatron_fsdp",
    "use_torch_fsdp2",
)
"""Flags (dest) that sparse layers lack, or that replace the model they are in."""


DEFAULT_COEFFICIENT = 0.01
"""Of a balance loss that is asked for, where the router has none of its own."""


def unset_flags(parser: ArgumentParser) -> dict[str, Any]:
    """Make None, for not given, the default of every MoE flag.

    Returns:
        dest -> Megatron's default.
    """
    defaults = {
        action.dest: action.default
        for action in parser._actions
        if action.dest.startswith("moe_") or action.dest in (*DERIVED, *DENSE_ONLY)
    }
    parser.set_defaults(**dict.fromkeys(defaults))
    return defaults


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


def derive_megatron_flags(args: Namespace, sffn: SparseFFNConfig | None) -> None:
    """Set Megatron's MoE flags from the S-FFN numbers.

    Raises:
        ConfigError: if the layers or the balance loss are not available.
    """
    pattern = layer_pattern(args.sffn_layers, args.num_layers)
    if sffn is None:
        return
    fields = moe_fields(sffn)
    # The one field of Megatron's config whose flag has another name.
    args.num_experts = fields.pop("num_moe_experts")
    vars(args).update(fields, moe_layer_freq=pattern)
    args.expert_tensor_parallel_size = args.expert_tensor_parallel_size or 1
    if args.moe_token_dispatcher_type is None and sffn.backend is not Backend.MEGATRON:
        args.moe_token_dispatcher_type = cheapest_dispatcher(
            sffn, args.hidden_size, exchange_of(args)
        )
    if args.moe_router_dtype is None:
        args.moe_router_dtype = "fp32"  # as all our routers score
    _derive_balance(args, sffn)


def _derive_balance(args: Namespace, sffn: SparseFFNConfig) -> None:
    """Megatron's balance flags, by router."""
    router, kinds = sffn.router, args.moe_router_load_balancing_type
    coefficients = args.moe_aux_loss_coeff
    # A loss of weight 0 is none: Megatron would log a column of zeros for it.
    args.moe_z_loss_coeff = args.moe_z_loss_coeff or None
    if kinds is None:
        on = router.balance_coefficient if coefficients is None else any(coefficients)
        kinds = ["aux_loss"] if on else ["none"]
    unknown = [kind for kind in kinds if kind not in BALANCE_LOSSES]
    if kinds != ["none"] and (unknown or len(set(kinds)) < len(kinds)):
        raise ConfigError(
            f"{typed('--moe-router-load-balancing-type', kinds)} is not available with "
            f"--sffn-router {router.name}; use none, or each of {', '.join(BALANCE_LOSSES)} at "
            "most once"
        )
    if kinds == ["none"]:
        args.moe_router_load_balancing_type, args.moe_aux_loss_coeff = "none", 0.0
        return
    default = router.balance_coefficient or DEFAULT_COEFFICIENT
    coefficients = coefficients or [default] * len(kinds)
    if len(coefficients) != len(kinds) or min(coefficients) < 0:
        raise ConfigError(
            f"{typed('--moe-aux-loss-coeff', coefficients)} is not a number of at least 0 for each "
            f"of {', '.join(kinds)}; leave it out for {default}"
        )
    weights = {kind: weight for kind, weight in zip(kinds, coefficients, strict=True) if weight}
    if not weights:
        args.moe_router_load_balancing_type, args.moe_aux_loss_coeff = "none", 0.0
        return
    args.moe_router_load_balancing_type = list(weights)
    args.moe_aux_loss_coeff = list(weights.values())


OTHER_NAMES = {
    "add_bias_linear": "--disable-bias-linear",
    "add_position_embedding": "--no-position-embedding",
    "fp4": "--fp4-format",
    "fp8": "--fp8-format",
    "layernorm_epsilon": "--norm-epsilon",
    "layernorm_zero_centered_gamma": "--apply-layernorm-1p",
    "nccl_ub": "--use-nccl-ub",
    "perform_initialization": "--no-initialization",
}
"""Flags (dest) that are typed otherwise than they are stored."""


def flag_of(dest: str) -> str:
    """An argparse dest as typed."""
    return OTHER_NAMES.get(dest, "--" + dest.replace("_", "-"))


def dest_of(flag: str) -> str:
    """The argparse dest of a flag."""
    return flag.removeprefix("--").replace("-", "_")


def typed(flag: str, value: Any) -> str:
    """A flag and its value as typed."""
    if value is True:
        return flag
    if isinstance(value, tuple):
        return f"{flag} {','.join(map(str, value))}"
    return f"{flag} {' '.join(map(str, value)) if isinstance(value, list) else value}"


def stated(flag: str, value: Any) -> str:
    """A flag as typed, also one that is off or not given."""
    return f"no {flag}" if value is False or value is None else typed(flag, value)
