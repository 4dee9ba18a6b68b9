"""Megatron's flags that would have no effect on pretraining: refused rather than ignored.

Inputs: Megatron's parser, and the namespace of the command line before Megatron validates it.

Design notes: `python -m tests.flag_sweep` tries every flag. A flag that it finds without effect is
listed here, or in `tests/flag_values.py` with the reason why the sweep cannot see its effect.
"""

from __future__ import annotations

import re
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import NamedTuple

from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols

from megatron_sffn.checks.problem import Problem
from megatron_sffn.flags.names import dest_of
from megatron_sffn.nn.quantile_balancing import QUANTILE_BALANCING

PROGRAMS = {
    "rl": "reinforcement learning",
    "biencoder": "retrieval models",
    "vision": "vision models",
    "inference": "generating text",
    "sft": "fine-tuning on dialogues",
}
"""Title of a group of flags in Megatron's help -> the program that reads them."""

ACTS_ON_PRETRAINING = ("data_sharding",)
"""Flags (dest) of these groups that act on pretraining as well."""

FLAGS_OF_OTHER_MODELS = (
    r"mamba_(inference|training)_\w+|is_hybrid_model|bert_\w+|mask_prob|short_seq_prob|sample_rate|mrope_section"
    r"|encoder_\w+|decoder_num_layers|decoder_seq_length|onnx_safe|openai_gelu"
    r"|apply_residual_connection_post_layernorm|flash_decode|mlp_chunks_for_prefill"
    r"|nccl_all_reduce_for_prefill|inference_\w+|mtp_standalone|mtp_hybrid_override_pattern"
    r"|gdp_\w+|logits_\w+|freeze_all_layers|use_mamba_mem_eff_path|dist_ckpt_save_pre_mcore_014"
    r"|metadata_path|test_mode|use_layer_wise_param_layout|fp16_lm_cross_entropy|mup_width_mult"
)
"""Pattern of flags (dest) that Megatron reads, but not to train a GPT."""


class Needs(NamedTuple):
    """Flags that act only together with another flag.

    Args:
        flags: pattern of their dests.
        needed: the other flag, as typed.
        condition: tells whether `needed` is met; None where it is met by any value of that flag.
    """

    flags: str
    needed: str
    condition: Callable[[Namespace], object] | None = None

    def is_met(self, args: Namespace) -> object:
        """True if the other flag is given."""
        if self.condition is None:
            return getattr(args, dest_of(self.needed))
        return self.condition(args)


def _reads_an_object_store(args: Namespace) -> bool:
    """True if Megatron downloads a data set from an object store before it reads it."""
    paths = (args.data_path, args.train_data_path, args.valid_data_path, args.test_data_path)
    return any("://" in prefix for path in paths for prefix in path or [])


MAMBA_SIZES = "mamba_(state_dim|head_dim|num_groups|num_heads)"
DELTA_NET_SIZES = "linear_(conv_kernel_dim|(key|value)_head_dim|num_(key|value)_heads)"


def _has_layer(symbol: str) -> Callable[[Namespace], object]:
    """A condition: a hybrid model has a kind of layer."""
    return lambda args: symbol in (args.hybrid_layer_pattern or "")


NEEDS = (
    Needs(MAMBA_SIZES, "M in --hybrid-layer-pattern", _has_layer(Symbols.MAMBA)),
    Needs(DELTA_NET_SIZES, "G in --hybrid-layer-pattern", _has_layer(Symbols.GDN)),
    Needs(r"muon_\w+", "--optimizer muon", lambda args: "muon" in args.optimizer),
    Needs(r"lion_\w+", "--optimizer lion", lambda args: args.optimizer == "lion"),
    Needs("sgd_momentum", "--optimizer sgd", lambda args: args.optimizer == "sgd"),
    Needs(r"adam_\w+", "--optimizer adam", lambda args: args.optimizer != "sgd"),
    Needs(r"mup_\w+", "--use-mup"),
    # Megatron's main
    Needs(r"mhc_\w+", "--enable-mhc-connections"),
    Needs("batch_invariant_backend", "--batch-invariant-mode"),
    Needs("otel_(service_name|span_groups)", "--otel-enabled"),
    Needs(r"qk_clip_\w+", "--qk-clip"),
    Needs(
        r"initial_loss_scale|min_loss_scale|loss_scale\w*|hysteresis"
        "|apply_query_key_layer_scaling",
        "--fp16",
    ),
    Needs(
        "accumulate_allreduce_grads_in_fp32|attention_softmax_in_fp32|grad_reduce_in_bf16"
        "|fp32_residual_connection|disable_bf16_reduced_precision_matmul"
        "|ddp_param_name_patterns_for_fp32_local_accumulation",
        "--bf16 or --fp16",
        lambda args: args.bf16 or args.fp16,
    ),
    Needs(
        r"fp8_\w+|first_last_layers_bf16|num_layers_at_\w+", "--fp8-format", lambda args: args.fp8
    ),
    Needs(r"fp4_\w+", "--fp4-format", lambda args: args.fp4),
    Needs(
        r"dsa_\w+|linear_\w+",
        "--experimental-attention-variant",
    ),
    Needs(
        r"q_lora_rank|kv_lora_rank|qk_head_dim|qk_pos_emb_head_dim|v_head_dim|mscale\w*"
        r"|rotary_scaling_factor|rope_type|cache_mla_latents|mla_\w+",
        "--multi-latent-attention",
    ),
    Needs(r"mtp_\w+", "--mtp-num-layers"),
    Needs(
        "activation_func_clamp_value|glu_linear_offset",
        "--swiglu or --quick-geglu",
        lambda args: args.swiglu or args.quick_geglu,
    ),
    Needs(
        r"yarn_\w+",
        "--position-embedding-type yarn",
        lambda args: args.position_embedding_type == "yarn",
    ),
    Needs(
        r"relative_attention_\w+",
        "--position-embedding-type relative",
        lambda args: args.position_embedding_type == "relative",
    ),
    Needs("rope_scaling_factor", "--use-rope-scaling"),
    Needs("num_query_groups", "--group-query-attention"),
    Needs(r"lr_wsd_\w+", "--lr-decay-style WSD", lambda args: args.lr_decay_style == "WSD"),
    Needs("decoupled_min_lr", "--decoupled-lr", lambda args: args.decoupled_lr is not None),
    Needs(
        "recompute_method|recompute_num_layers",
        "--recompute-granularity full",
        lambda args: args.recompute_granularity == "full",
    ),
    Needs(
        "recompute_modules",
        "--recompute-granularity selective",
        lambda args: args.recompute_granularity == "selective" or args.recompute_activations,
    ),
    Needs(
        "moe_token_drop_policy",
        "--moe-expert-capacity-factor",
        lambda args: args.moe_expert_capacity_factor is not None,
    ),
    Needs(
        "moe_router_bias_update_rate",
        "--moe-router-enable-expert-bias",
    ),
    Needs(
        "moe_router_quantile_balancing_ema",
        f"--moe-router-load-balancing-type {QUANTILE_BALANCING}",
        lambda args: args.moe_router_load_balancing_type == [QUANTILE_BALANCING],
    ),
    Needs(
        r"profile_\w+|use_pytorch_profiler|record_shapes|nvtx_ranges",
        "--profile",
    ),
    Needs(
        r"pytorch_profiler_\w+",
        "--use-pytorch-profiler",
    ),
    Needs(r"async_\w+|use_persistent_ckpt_worker", "--async-save"),
    Needs(
        "non_persistent_save_interval",
        "--non-persistent-ckpt-type",
    ),
    Needs(
        r"non_persistent_(?!save_interval)\w+",
        "--non-persistent-save-interval",
    ),
    Needs(
        r"ckpt_convert_\w+",
        "--ckpt-convert-format",
    ),
    Needs(
        "cuda_graph_modules|cuda_graph_scope_deprecated|cuda_graph_warmup_steps",
        "--cuda-graph-impl",
        lambda args: args.cuda_graph_impl not in (None, "none"),
    ),
    Needs(r"replication_\w+", "--replication"),
    Needs(
        r"\w+_to_tensorboard|tensorboard_\w+|moe_per_layer_logging",
        "--tensorboard-dir",
    ),
    Needs(
        r"straggler_\w+|disable_straggler_on_startup",
        "--log-straggler",
    ),
    Needs(r"calc_ft_timeouts|ft_\w+", "--enable-ft-package"),
    Needs(r"adlr_autoresume_\w+", "--adlr-autoresume"),
    Needs(
        r"fault_injector_(?!ranks|num_ranks)\w+",
        "--fault-injector-ranks",
        lambda args: args.fault_injector_ranks or args.fault_injector_num_ranks,
    ),
    Needs(
        r"one_logger_\w+|app_tag_run_\w+",
        "the package one_logger",
        lambda args: find_spec("one_logger") is not None,
    ),
    Needs(
        "use_(mp_args|tokenizer_model)_from_checkpoint_args",
        "--use-checkpoint-args",
    ),
    Needs(
        r"flight_recorder_(?!dump_path)\w+",
        "--flight-recorder-dump-path",
    ),
    Needs(
        "memory_snapshot_path",
        "--record-memory-history",
    ),
    Needs("error_injection_type", "--error-injection-rate"),
    Needs(
        "max_seqlen_per_dp_cp_rank",
        "--hybrid-context-parallel",
    ),
    Needs(
        "cp_comm_type",
        "--context-parallel-size",
        lambda args: args.context_parallel_size > 1,
    ),
    Needs(
        "kitchen_attention_backend",
        "--use-kitchen-attention",
    ),
    Needs("manual_gc_interval|manual_gc_eval", "--manual-gc"),
    Needs(
        r"optimizer_offload_fraction|overlap_cpu_optimizer_\w+|pin_cpu_\w+"
        "|use_torch_optimizer_for_cpu_offload",
        "--optimizer-cpu-offload",
    ),
    Needs(
        r"offload_modules|min_offloaded_\w+|delay_offload_\w+|delta_offload_\w+"
        r"|activation_offload_\w+|fine_grained_offloading_\w+",
        "--fine-grained-activation-offloading",
    ),
    Needs(
        r"cpu_offloading_(?!num_layers)\w+",
        "--cpu-offloading-num-layers",
    ),
    Needs(
        r"megatron_fsdp_\w+|fsdp_\w+|\w+_fsdp_dtensor_load|enable_full_sharding_in_hsdp"
        r"|(data_parallel|outer_dp)_sharding_strategy|keep_fp8_transpose_cache"
        "|create_all_gather_group",
        "--use-megatron-fsdp",
    ),
    Needs(r"torch_fsdp2_\w+", "--use-torch-fsdp2"),
    Needs(r"tp_comm_(?!overlap$)\w+", "--tp-comm-overlap"),
    Needs(
        "wgrad_deferral_limit",
        "--defer-embedding-wgrad-compute",
    ),
    Needs(
        "decrease_batch_size_if_needed",
        "--rampup-batch-size",
    ),
    Needs("object_storage_cache_path", "data in an object store", _reads_an_object_store),
    Needs(
        r"tokenizer_model|tokenizer_(hf|sentencepiece)_\w+|special_tokens|merge_file"
        r"|vocab_file|vocab_extra_ids|tiktoken_\w+|chat_template|trust_remote_code|use_gigatoken",
        "a --tokenizer-type that reads text",
        lambda args: args.tokenizer_type not in (None, "NullTokenizer"),
    ),
    Needs(r"wandb_\w+", "--wandb-project"),
    Needs(
        "validation_set_names",
        "--multiple-validation-sets",
    ),
    Needs(r"fim_\w+", "--fim-data"),
    Needs(r"inprocess_\w+", "--inprocess-restart"),
    Needs("save_retain_interval|save_tokens_per_expert_interval", "--save"),
    Needs(
        r"finetune|no_load_\w+|exit_on_missing_checkpoint|auto_detect_ckpt_format"
        r"|ckpt_fully_parallel_load\w*|override_opt_param_scheduler"
        "|use_checkpoint_opt_param_scheduler|override_ckpt_iteration",
        "--load",
        lambda args: args.load or args.pretrained_checkpoint,
    ),
)
"""Flags that would be ignored without another flag."""


class Idle(NamedTuple):
    """A flag that has no effect on some runs, or on any.

    Args:
        flag: as typed.
        default: the flag's value where it is not given.
        reason: why it has no effect.
        remedy: what to do instead.
        acts: tells whether the flag has an effect on a run after all.
    """

    flag: str
    default: object
    reason: str
    remedy: str
    acts: Callable[[Namespace], object]


def idle_flags(parser: ArgumentParser) -> dict[str, Idle]:
    """List the flags without an effect on pretraining, or on some runs.

    Returns:
        dest -> the flag.
    """
    idle: dict[str, Idle] = {}
    for group in parser._action_groups:
        for action in group._group_actions:
            dest, flag = action.dest, max(action.option_strings, key=len, default="")
            # If two flags have the same dest, the first has the default.
            if dest in ACTS_ON_PRETRAINING or dest in idle:
                continue
            if reason := _reason_without_effect(group.title, dest):
                idle[dest] = Idle(flag, action.default, reason, "leave it out", lambda args: False)
                continue
            need = next((need for need in NEEDS if re.fullmatch(need.flags, dest)), None)
            if need is not None and flag != need.needed.partition(" ")[0]:
                reason = f"has nothing to act on without {need.needed}"
                remedy = "add that, or leave it out"
                idle[dest] = Idle(flag, action.default, reason, remedy, need.is_met)
    return idle


def _reason_without_effect(group: str | None, dest: str) -> str | None:
    """Why a flag has no effect on any pretraining run; None if it can have one."""
    if group in PROGRAMS:
        return f"is for {PROGRAMS[group]}, and has no effect on pretraining"
    if re.fullmatch(FLAGS_OF_OTHER_MODELS, dest):
        return "has no effect on a GPT in training"
    return None


def flags_without_effect(args: Namespace, idle: dict[str, Idle]) -> Iterator[Problem]:
    """Megatron's flags that would be ignored."""
    for dest, flag in idle.items():
        value = getattr(args, dest)
        if value != flag.default and not flag.acts(args):
            yield Problem(flag.flag, value, flag.reason, flag.remedy)


CHECKS = (flags_without_effect,)
