"""Megatron's own flags under sparse layers: which follow from ours, which act, which are refused.

Enters: Megatron's namespace before validation. Leaves: the same one with its MoE flags derived from
the S-FFN numbers, or one sentence.

Choice: of Megatron's seventy MoE flags a few act on our layers. Any other that is given is an error
rather than ignored, also one that a later Megatron adds; to be able to tell, `unset_flags` makes
None the default of them all while the command line is read.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

import torch

from megatron_sffn.flags.names import typed
from megatron_sffn.nn.comm_volume import cheapest_dispatcher
from megatron_sffn.nn.config import Backend, SparseFFNConfig, moe_fields
from megatron_sffn.nn.layer_spec import layer_pattern
from megatron_sffn.nn.load_balancing import BALANCE_LOSSES
from megatron_sffn.nn.parallel_layout import ParallelLayout
from megatron_sffn.utils.errors import ConfigError

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
            sffn, args.hidden_size, layout_of(args)
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


def layout_of(args: Namespace) -> ParallelLayout:
    """The parallel layout that Megatron's arguments describe, before or after their validation."""
    return ParallelLayout(
        world_size=args.world_size,
        tp=args.tensor_model_parallel_size,
        pp=args.pipeline_model_parallel_size,
        # Megatron's validation adds this name.
        virtual_stages=vars(args).get("virtual_pipeline_model_parallel_size") or 1,
        cp=args.context_parallel_size,
        ep=args.expert_model_parallel_size,
        etp=args.expert_tensor_parallel_size or 1,
        sequence_parallel=args.sequence_parallel,
        dispatcher=args.moe_token_dispatcher_type or "alltoall",
        dtype=dtype_of(args),
        comm_backend=args.distributed_backend,
        router_groups=args.moe_router_num_groups or 1,
        router_group_topk=args.moe_router_group_topk or 1,
        first_stage_layers=args.decoder_first_pipeline_num_layers,
        last_stage_layers=args.decoder_last_pipeline_num_layers,
    )


def dtype_of(args: Namespace) -> torch.dtype:
    """The dtype of weights and activations by `--bf16` and `--fp16`."""
    if args.bf16:
        return torch.bfloat16
    return torch.float16 if args.fp16 else torch.float32


def derive_evaluation(args: Namespace) -> None:
    """What an evaluation reads, and when there is one.

    Without `--eval-interval` there is none before the end, as Megatron's help says; Megatron's own
    code divides by it. Megatron overwrites `--eval-iters` under `--full-validation`, which it
    serves for a list of data sets only.
    """
    args.sffn_separate_validation_sets = args.multiple_validation_sets
    args.multiple_validation_sets = args.full_validation
    args.sffn_eval_iters = args.eval_iters
    if args.eval_interval is None:
        args.eval_interval = max(args.train_iters or 0, args.train_samples or 0) + 1
