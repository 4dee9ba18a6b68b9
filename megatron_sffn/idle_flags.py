"""Megatron's flags that have no effect on pretraining here, each refused rather than ignored.

Inputs: Megatron's parser and namespace before validation. Outputs: the first such flag that was
given another value than its default.

Design notes: `python -m tests.flag_sweep` tries every flag; what it finds without effect is here,
or in `tests/flag_values.py` with the reason why it shows on other machines only.
"""

from __future__ import annotations

import re
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from typing import NamedTuple

from megatron_sffn.errors import ConfigError
from megatron_sffn.megatron_flags import typed

PROGRAMS = {
    "rl": "reinforcement learning",
    "biencoder": "retrieval models",
    "vision": "vision models",
    "inference": "generating text",
    "sft": "fine-tuning on dialogues",
}
"""Groups of flags in Megatron's help -> the programs that they are for."""

ACTING = ("data_sharding",)
"""Flags (dest) of these groups that act on pretraining, too."""

OF_OTHER_MODELS = (
    r"mamba_\w+|is_hybrid_model|bert_\w+|mask_prob|short_seq_prob|sample_rate|mrope_section"
    r"|encoder_\w+|decoder_num_layers|decoder_seq_length|onnx_safe|openai_gelu"
    r"|apply_residual_connection_post_layernorm|flash_decode|mlp_chunks_for_prefill"
    r"|nccl_all_reduce_for_prefill|inference_\w+|mtp_standalone|mtp_hybrid_override_pattern"
)
"""Flags (dest) that Megatron reads for models or programs other than a GPT in training."""


class Needs(NamedTuple):
    """Flags that act beside another one alone.

    Args:
        flags: pattern of their dests.
        other: what must be there, as typed.
        is_there: whether it is.
    """

    flags: str
    other: str
    is_there: Callable[[Namespace], bool]


PAIRS = (
    Needs(r"muon_\w+", "--optimizer muon", lambda args: "muon" in args.optimizer),
    Needs(r"lion_\w+", "--optimizer lion", lambda args: args.optimizer == "lion"),
    Needs("sgd_momentum", "--optimizer sgd", lambda args: args.optimizer == "sgd"),
    Needs(r"adam_\w+", "--optimizer adam", lambda args: args.optimizer != "sgd"),
    Needs(r"mup_\w+", "--use-mup", lambda args: args.use_mup),
    Needs(r"qk_clip_\w+", "--qk-clip", lambda args: args.qk_clip),
    Needs(
        r"fp8_\w+|first_last_layers_bf16|num_layers_at_\w+", "--fp8-format", lambda args: args.fp8
    ),
    Needs(r"fp4_\w+", "--fp4-format", lambda args: args.fp4),
    Needs(
        r"dsa_\w+|linear_\w+",
        "--experimental-attention-variant",
        lambda args: args.experimental_attention_variant,
    ),
    Needs(
        r"q_lora_rank|kv_lora_rank|qk_head_dim|qk_pos_emb_head_dim|v_head_dim|mscale\w*"
        r"|rotary_scaling_factor|cache_mla_latents|mla_\w+",
        "--multi-latent-attention",
        lambda args: args.multi_latent_attention,
    ),
    Needs(r"mtp_\w+", "--mtp-num-layers", lambda args: args.mtp_num_layers),
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
    Needs("rope_scaling_factor", "--use-rope-scaling", lambda args: args.use_rope_scaling),
    Needs("num_query_groups", "--group-query-attention", lambda args: args.group_query_attention),
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
        lambda args: args.moe_router_enable_expert_bias,
    ),
    Needs(
        r"profile_\w+|use_pytorch_profiler|record_shapes|nvtx_ranges",
        "--profile",
        lambda args: args.profile,
    ),
    Needs(
        r"pytorch_profiler_\w+",
        "--use-pytorch-profiler",
        lambda args: args.use_pytorch_profiler,
    ),
    Needs(r"async_\w+|use_persistent_ckpt_worker", "--async-save", lambda args: args.async_save),
    Needs(
        r"non_persistent_\w+",
        "--non-persistent-ckpt-type",
        lambda args: args.non_persistent_ckpt_type,
    ),
    Needs(
        r"ckpt_convert_\w+",
        "--ckpt-convert-format",
        lambda args: args.ckpt_convert_format,
    ),
    Needs(
        "cuda_graph_modules|cuda_graph_scope_deprecated",
        "--cuda-graph-impl",
        lambda args: args.cuda_graph_impl not in (None, "none"),
    ),
    Needs(r"replication_\w+", "--replication", lambda args: args.replication),
    Needs(r"wandb_\w+", "--wandb-project", lambda args: args.wandb_project),
    Needs(
        "validation_set_names",
        "--multiple-validation-sets",
        lambda args: args.multiple_validation_sets,
    ),
    Needs(r"fim_\w+", "--fim-data", lambda args: args.fim_data),
    Needs(r"inprocess_\w+", "--inprocess-restart", lambda args: args.inprocess_restart),
    Needs("save_retain_interval|save_tokens_per_expert_interval", "--save", lambda args: args.save),
    Needs(
        r"finetune|no_load_\w+|exit_on_missing_checkpoint|auto_detect_ckpt_format"
        r"|ckpt_fully_parallel_load\w*|override_opt_param_scheduler"
        "|use_checkpoint_opt_param_scheduler",
        "--load",
        lambda args: args.load or args.pretrained_checkpoint,
    ),
)
"""What acts beside another flag alone, and would be ignored without it."""


class Idle(NamedTuple):
    """A flag that may have no effect.

    Args:
        flag: as typed.
        default: its value where it is not given.
        why: the sentence's end.
        acts: whether it has an effect after all.
    """

    flag: str
    default: object
    why: str
    acts: Callable[[Namespace], object]


def idle_flags(parser: ArgumentParser) -> dict[str, Idle]:
    """Flags without an effect, or without one in some runs.

    Returns:
        dest -> the flag.
    """
    found = {}
    for group in parser._action_groups:
        for action in group._group_actions:
            flag = max(action.option_strings, key=len, default="")
            pair = next((pair for pair in PAIRS if re.fullmatch(pair.flags, action.dest)), None)
            if action.dest in ACTING or action.dest in found:  # the first of two has the default
                continue
            if group.title in PROGRAMS:
                program = PROGRAMS[group.title]
                why = f"is for {program}, and has no effect on pretraining; leave it out"
                found[action.dest] = Idle(flag, action.default, why, lambda args: False)
            elif re.fullmatch(OF_OTHER_MODELS, action.dest):
                why = "has no effect on a GPT in training; leave it out"
                found[action.dest] = Idle(flag, action.default, why, lambda args: False)
            elif pair is not None and flag != pair.other.partition(" ")[0]:
                why = f"has nothing to act on without {pair.other}; add that, or leave it out"
                found[action.dest] = Idle(flag, action.default, why, pair.is_there)
    return found


def check_idle_flags(args: Namespace, idle: dict[str, Idle]) -> None:
    """None of them was given in vain.

    Args:
        args: not validated yet.
        idle: of `idle_flags`.

    Raises:
        ConfigError: for the first that was.
    """
    for dest, (flag, default, why, acts) in idle.items():
        value = getattr(args, dest)
        if value != default and not acts(args):
            raise ConfigError(f"{typed(flag, value)} {why}")
