"""Megatron's own flags in a run with sparse layers: which are derived, and which act.

Inputs: Megatron's namespace before Megatron validates it. Outputs: the same namespace with the MoE
flags derived from the S-FFN numbers.

Design notes: a few of Megatron's seventy MoE flags act on our layers. Any other one that is given
is refused rather than ignored (`checks/flags.py`), also one that a later Megatron adds. To tell
whether a flag was given, `unset_flags` makes None the default of all MoE flags while the command
line is read.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols

from megatron_sffn.nn.comm_volume import cheapest_dispatcher
from megatron_sffn.nn.config import Backend, RouterConfig, SparseFFNConfig
from megatron_sffn.nn.layer_pattern import (
    cut,
    hybrid_layers,
    hybrid_pattern,
    layer_pattern,
    prediction_layers,
)
from megatron_sffn.nn.parallel_layout import ParallelLayout
from megatron_sffn.nn.quantile_balancing import QUANTILE_BALANCING
from megatron_sffn.nn.transformer_config import moe_fields

ACTIVATIONS = ("swiglu", "squared_relu", "quick_geglu", "sffn_relu")
"""Flags (dest) of activations other than GELU."""

DERIVED = {
    "num_experts": "B = E·k/g",
    "moe_router_topk": "K = k/g",
    "moe_ffn_hidden_size": "--sffn-block-size",
    "moe_layer_freq": "--sffn-layers",
    "moe_shared_expert_intermediate_size": "--sffn-shared-blocks",
    "moe_router_pre_softmax": "always on",
}
"""MoE flags (dest) -> the S-FFN number that they are derived from."""

REPLACED = {
    "moe_router_score_function": {
        "softmax": "--sffn-gate softmax-chosen",
        "sigmoid": "--sffn-gate sigmoid-chosen",
        "sqrtsoftplus": "--sffn-gate sqrt-softplus-chosen",
    },
    "overlap_moe_expert_parallel_comm": {"True": "--sffn-exchange-chunks 2"},
}
"""MoE flags (dest) whose values we give by another flag: value -> our flag."""

LAYER = (
    "moe_router_dtype",
    "moe_token_dispatcher_type",
    "moe_layer_recompute",
    "moe_per_layer_logging",
)
"""MoE flags (dest) that act with every router."""

DENSE_ONLY = (
    "cuda_graph_impl",
    "delay_wgrad_compute",
    "enable_cuda_graph",
    "external_cuda_graph",
    "fine_grained_activation_offloading",
    "heterogeneous_layers_config_encoded_json",
    "heterogeneous_layers_config_path",
    "overlap_dispatch_backward_with_experts_wgrad",
    "overlap_moe_expert_parallel_comm",
    "save_tokens_per_expert_interval",
    "spec",
    "use_megatron_fsdp",
    "use_torch_fsdp2",
)
"""Flags (dest) of features that sparse layers do not have, or of other models: `dense` only."""

STAGES_OF_GPT = (
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "num_layers_per_virtual_pipeline_stage",
    "num_virtual_stages_per_pipeline_rank",
)
"""Flags (dest) that say which layers a pipeline stage has; in a hybrid model the pattern does."""

DEFAULT_COEFFICIENT = 0.01
"""Coefficient of a balance loss that is requested of a router without a default of its own."""


def unset_flags(parser: ArgumentParser) -> dict[str, Any]:
    """Make None ("not given") the default of every MoE flag.

    Returns:
        dest -> Megatron's default.
    """
    defaults = {
        action.dest: action.default for action in parser._actions if is_moe_flag(action.dest)
    }
    parser.set_defaults(**dict.fromkeys(defaults))
    return defaults


def is_moe_flag(dest: str) -> bool:
    """True for Megatron's MoE flags, and for flags that act on dense models only."""
    return dest.startswith("moe_") or dest in (*DERIVED, *DENSE_ONLY)


def derive_megatron_flags(args: Namespace, sffn: SparseFFNConfig | None) -> None:
    """Set Megatron's MoE flags from the S-FFN numbers.

    Raises:
        ConfigError: if `--sffn-layers` does not fit the number of layers.
    """
    if args.sffn_model == "hybrid" and args.hybrid_layer_pattern is None:
        _derive_hybrid_pattern(args, is_sparse=sffn is not None)
    if args.hybrid_layer_pattern is not None:
        args.hybrid_layer_pattern = cut(
            args.hybrid_layer_pattern, args.pipeline_model_parallel_size
        )
    pattern = layer_pattern(args.sffn_layers, args.num_layers, args.hybrid_layer_pattern)
    if sffn is None:
        return
    fields = moe_fields(sffn)
    # The only field of Megatron's config that is named differently from its flag.
    args.num_experts = fields.pop("num_moe_experts")
    vars(args).update(fields, moe_layer_freq=pattern)
    args.expert_tensor_parallel_size = args.expert_tensor_parallel_size or 1
    if args.moe_token_dispatcher_type is None and sffn.backend is not Backend.MEGATRON:
        args.moe_token_dispatcher_type = cheapest_dispatcher(
            sffn, args.hidden_size, layout_of(args)
        )
    if args.moe_router_dtype is None:
        args.moe_router_dtype = "fp32"  # all our routers score in fp32
    _derive_load_balancing(args, sffn.routers)


def take_layers_of_pattern(args: Namespace) -> None:
    """Set the flags that `--hybrid-layer-pattern` stands for, where they are not given."""
    if args.hybrid_layer_pattern is None:
        return
    layers = hybrid_layers(args.hybrid_layer_pattern)
    if args.num_layers is None:
        args.num_layers = len(layers)
    if Symbols.MLA in layers:
        args.multi_latent_attention = True
    if args.mtp_num_layers is None:
        args.mtp_num_layers = len(prediction_layers(args.hybrid_layer_pattern)) or None


def _derive_hybrid_pattern(args: Namespace, *, is_sparse: bool) -> None:
    """Set `--hybrid-layer-pattern` to the layers and pipeline stages of the flags of a GPT."""
    pattern = [0] * args.num_layers
    if is_sparse:
        pattern = layer_pattern(args.sffn_layers, args.num_layers)
    layout = replace(layout_of(args), virtual_stages=num_virtual_stages(args))
    chunks = layout.layers_per_chunk(args.num_layers)
    args.hybrid_layer_pattern = hybrid_pattern(
        pattern,
        chunks,
        latent=args.multi_latent_attention,
        predicted_tokens=args.mtp_num_layers or 0,
    )
    args.num_layers = 2 * args.num_layers
    for dest in STAGES_OF_GPT:
        setattr(args, dest, None)


def num_virtual_stages(args: Namespace) -> int:
    """Model chunks of a pipeline stage by the flags, before Megatron validates them."""
    if args.num_virtual_stages_per_pipeline_rank:
        return int(args.num_virtual_stages_per_pipeline_rank)
    chunk = args.num_layers_per_virtual_pipeline_stage
    return args.num_layers // args.pipeline_model_parallel_size // chunk if chunk else 1


def _derive_load_balancing(args: Namespace, routers: Sequence[RouterConfig]) -> None:
    """Set the load-balancing flags to the losses that have a coefficient above 0."""
    by_prices = args.moe_router_load_balancing_type == [QUANTILE_BALANCING]
    losses, coefficients = requested_balance_losses(args, routers)
    used = {loss: c for loss, c in zip(losses, coefficients, strict=True) if c}
    # Megatron compares the type with this string, and searches a list for losses.
    args.moe_router_load_balancing_type = QUANTILE_BALANCING if by_prices else list(used) or "none"
    args.moe_aux_loss_coeff = list(used.values()) or 0.0
    # Megatron would log a column of zeros for a coefficient of 0.
    args.moe_z_loss_coeff = args.moe_z_loss_coeff or None


Routers = Sequence[RouterConfig | type[RouterConfig]]
"""The routers of a model."""


def requested_balance_losses(args: Namespace, routers: Routers) -> tuple[list[str], list[float]]:
    """The load-balancing losses and coefficients of the flags, else the routers' defaults."""
    losses, coefficients = args.moe_router_load_balancing_type, args.moe_aux_loss_coeff
    if losses is None:
        is_on = any(coefficients or [router.balance_coefficient for router in routers])
        losses = ["aux_loss"] if is_on else ["none"]
    if losses in (["none"], [QUANTILE_BALANCING]):
        return [], []
    return losses, coefficients or [default_balance_coefficient(routers)] * len(losses)


def default_balance_coefficient(routers: Routers) -> float:
    """Coefficient of a load-balancing loss where `--moe-aux-loss-coeff` is not given."""
    return max(router.balance_coefficient for router in routers) or DEFAULT_COEFFICIENT


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
    """Set the times and the data of evaluations.

    Without `--eval-interval` the only evaluation is at the end, as Megatron's help says; Megatron's
    code would divide by None. Under `--full-validation` Megatron overwrites `--eval-iters`, and
    accepts a list of validation sets only.
    """
    args.sffn_separate_validation_sets = args.multiple_validation_sets
    args.multiple_validation_sets = args.full_validation
    args.sffn_eval_iters = args.eval_iters
    if args.eval_interval is None:
        args.eval_interval = max(args.train_iters or 0, args.train_samples or 0) + 1
