"""Describes a run in `summary.json`, with everything that a comparison of two runs needs.

Inputs: Megatron's validated namespace and the model's shape. Outputs: a dictionary that can be
written as JSON: the command, the commit, and, by section, the flags that determine the result.
"""

from __future__ import annotations

import dataclasses
import shlex
import subprocess
from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron_sffn.accounting import ModelShape
from megatron_sffn.nn.config import RouterConfig

CLONE = Path(__file__).parents[2]
"""The folder of the clone, if the package is not installed."""

SECTIONS: dict[str, tuple[str, ...]] = {
    "model": (
        "position_embedding_type",
        "rotary_base",
        "rotary_percent",
        "window_size",
        "softmax_type",
        "normalization",
        "layernorm_epsilon",
        "attention_dropout",
        "hidden_dropout",
        "init_method_std",
        "params_dtype",
        "activation_func_clamp_value",
        "glu_linear_offset",
        "sffn_layers",
        "sffn_relu",
    ),
    "balance": (
        "moe_router_load_balancing_type",
        "moe_aux_loss_coeff",
        "moe_z_loss_coeff",
        "moe_router_enable_expert_bias",
        "moe_router_bias_update_rate",
        "moe_router_quantile_balancing_ema",
        "moe_expert_capacity_factor",
    ),
    "optimizer": (
        "optimizer",
        "lr",
        "min_lr",
        "lr_decay_style",
        "lr_decay_iters",
        "lr_decay_samples",
        "lr_warmup_iters",
        "lr_warmup_samples",
        "lr_warmup_fraction",
        "weight_decay",
        "sffn_lr_mult",
        "sffn_wd_mult",
        "adam_beta1",
        "adam_beta2",
        "adam_eps",
        "sgd_momentum",
        "clip_grad",
        "use_distributed_optimizer",
    ),
    "batch": (
        "micro_batch_size",
        "global_batch_size",
        "seq_length",
        "train_iters",
        "train_samples",
        "rampup_batch_size",
        "step_batch_size_schedule",
    ),
    "data": (
        "mock_data",
        "data_path",
        "train_data_path",
        "valid_data_path",
        "test_data_path",
        "data_args_path",
        "per_split_data_args_path",
        "split",
        "reset_position_ids",
        "reset_attention_mask",
        "eod_mask_loss",
        "eval_interval",
        "sffn_eval_iters",
        "eval_global_batch_size",
        "full_validation",
        "sffn_validation_data",
    ),
    "tokenizer": ("tokenizer_type", "tokenizer_model", "vocab_file", "vocab_size"),
    "started_from": ("load", "ckpt_step", "finetune"),
}
"""Section of `summary.json` -> the flags (argparse dest) in it."""


def describe_run(args: Namespace, shape: ModelShape) -> dict[str, Any]:
    """The command, the commit, and the flags by section, with the values that were in force.

    Args:
        args: Megatron's namespace, validated.
        shape: the model's shape.
    """
    sections = {
        # A flag that a later Megatron drops must not make the summary fail at the end of a run.
        section: {name: _as_json(vars(args).get(name)) for name in names}
        for section, names in SECTIONS.items()
    }
    sizes = dataclasses.asdict(dataclasses.replace(shape, sffn=None, sparse_layers=0))
    del sizes["sffn"]
    sections["model"] = {**sizes, "sparse_layers": shape.sparse_layers, **sections["model"]}
    if shape.sffn is not None:
        settings = {
            item.name: getattr(shape.sffn, item.name)
            for item in dataclasses.fields(shape.sffn)
            if item.name not in ("router", "other_routers", "seed")
        }
        sections["sffn"] = {name: _as_json(value) for name, value in settings.items()}
        router, *others = shape.sffn.routers
        sections["router_settings"] = _settings(router)
        if others:
            sections["other_router_settings"] = {other.name: _settings(other) for other in others}
    return {
        "command": shlex.join(["python", "-m", "megatron_sffn.pretrain", *args.sffn_command]),
        "commit": commit(CLONE),
        **sections,
    }


def _settings(router: RouterConfig) -> dict[str, Any]:
    """The fields of a router's config."""
    return {name: _as_json(value) for name, value in dataclasses.asdict(router).items()}


def commit(clone: Path) -> str | None:
    """The commit of a clone, with `-dirty` if its files differ from it; None for no clone."""
    if not (clone / ".git").exists():
        return None  # an installed package may lie inside the clone of another project
    command = ["git", "-C", str(clone), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        result = subprocess.run(
            [*command, "--exclude=*"], capture_output=True, text=True, check=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None


def _as_json(value: Any) -> Any:
    """JSON's own types and lists of them unchanged; other values, such as a dtype, as a string."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return str(value) if isinstance(value, str) else value
    if isinstance(value, (list, tuple)):
        return [_as_json(item) for item in value]
    return str(value)
