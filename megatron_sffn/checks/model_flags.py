"""Flags that define a model, and where those of a run and of a checkpoint differ.

Inputs: the arguments of both. Outputs: pairs of flags as a user would type them, the run's first.
"""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from collections.abc import Callable, Iterator

from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols

from megatron_sffn.flags.megatron_flags import ACTIVATIONS
from megatron_sffn.flags.names import flag_of, stated
from megatron_sffn.flags.sffn_flags import saved_config
from megatron_sffn.nn.config import Backend, SparseFFNConfig
from megatron_sffn.nn.layer_pattern import hybrid_layers, hybrid_pattern, layer_pattern
from megatron_sffn.nn.quantile_balancing import QUANTILE_BALANCING

FLAGS_WITH_VALUE = (
    "hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "normalization",
    "layernorm_epsilon",
    "position_embedding_type",
    "no_rope_freq",
    "softmax_type",
    "experimental_attention_variant",
    "mtp_num_layers",
    "moe_latent_size",
    "moe_router_num_groups",
    "moe_router_group_topk",
    "moe_router_topk_scaling_factor",
    "activation_func_clamp_value",
    "glu_linear_offset",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_head_dim",
    "qk_pos_emb_head_dim",
    "v_head_dim",
    "mamba_state_dim",
    "mamba_head_dim",
    "mamba_num_groups",
    "mamba_num_heads",
    "linear_conv_kernel_dim",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "mup_embedding_mult",
    "mup_output_mult",
    "mup_attn_scale_power",
)
"""Flags (dest) with a value that define the model."""

SWITCHES = (
    "untie_embeddings_and_output_weights",
    "add_bias_linear",
    "add_qkv_bias",
    "qk_layernorm",
    "qk_l2_norm",
    "attention_output_gate",
    "multi_latent_attention",
    "layernorm_zero_centered_gamma",
    "apply_residual_connection_post_layernorm",
    "add_position_embedding",
    "rotary_interleaved",
    "mtp_use_repeated_layer",
    "use_mup",
    "moe_router_enable_expert_bias",
)
"""Flags (dest) without a value that define the model."""

INVERTED = ("add_bias_linear", "add_position_embedding")
"""Switches (dest) that are True where the flag is not given."""

ATTENTION_SPAN = (
    "rotary_base",
    "rotary_percent",
    "rotary_seq_len_interpolation_factor",
    "use_rope_scaling",
    "rope_scaling_factor",
    "window_size",
    "window_attn_skip_freq",
)
"""Flags (dest) that set how far attention looks; `--finetune` may change them."""


def model_differences(
    args: Namespace, saved: Namespace, sffn: SparseFFNConfig | None
) -> Iterator[tuple[str, str]]:
    """Flags of the model in this run and in the checkpoint, where they differ."""
    texts = [_with_value(dest) for dest in (*FLAGS_WITH_VALUE, "sffn_router")]
    texts += [_switch(dest) for dest in SWITCHES]
    texts += [_activation, _prices]
    if args.position_embedding_type == "learned_absolute":
        texts.append(_with_value("max_position_embeddings"))
    yield from _differences(texts, args, saved)
    yield from _layer_differences(args, saved)
    width = [_with_value("ffn_hidden_size")]
    if sffn is None:
        yield from _differences(width, args, saved)
        return
    saved_sffn = saved_layer(saved)
    if Symbols.MLP in _layers(args):
        yield from _differences(width, args, saved)
    for name in ("active_cells", "expansion", "shared_blocks", "layers_per_table"):
        flag, value, saved_value = (
            flag_of(f"sffn_{name}"),
            getattr(sffn, name),
            getattr(saved_sffn, name),
        )
        if value != saved_value:
            yield f"{flag} {value}", f"{flag} {saved_value}"
    yield from router_differences(sffn, saved_sffn, training_only=False)
    if (sffn.backend is Backend.MEGATRON) != (saved_sffn.backend is Backend.MEGATRON):
        # Megatron's experts are stored one by one, ours as tables.
        yield f"--sffn-backend {sffn.backend}", f"--sffn-backend {saved_sffn.backend}"


def span_differences(args: Namespace, saved: Namespace) -> Iterator[tuple[str, str]]:
    """Flags of the reach of attention, where they differ."""
    yield from _differences(list(map(_with_value, ATTENTION_SPAN)), args, saved)


def _layer_differences(args: Namespace, saved: Namespace) -> Iterator[tuple[str, str]]:
    """Flags of the layers that differ.

    A hybrid model can load the GPT with the same layers, but not its multi-token prediction.
    """
    is_hybrid, was_hybrid = (vars(a).get("hybrid_layer_pattern") is not None for a in (args, saved))
    loads = was_hybrid or not vars(args).get("mtp_num_layers") if is_hybrid else not was_hybrid
    if _layers(args) == _layers(saved) and loads:
        return
    flag = _with_value("sffn_layers")
    if is_hybrid or was_hybrid:
        flag = _layer_flags
    elif args.num_layers != saved.num_layers:
        flag = _with_value("num_layers")
    yield from _differences([flag], args, saved)


def _layers(args: Namespace) -> str:
    """The layers of a GPT or a hybrid model, by the symbols of a hybrid model."""
    pattern = vars(args).get("hybrid_layer_pattern")
    if pattern is not None:
        return hybrid_layers(pattern)
    sparse = [0] * args.num_layers
    if args.sffn_router != "dense":
        sparse = layer_pattern(args.sffn_layers, args.num_layers)
    latent = bool(vars(args).get("multi_latent_attention"))
    return hybrid_pattern(sparse, [args.num_layers], latent=latent)


def _layer_flags(args: Namespace) -> str:
    """The flags that say what the layers are."""
    if vars(args).get("hybrid_layer_pattern") is not None:
        return stated("--hybrid-layer-pattern", args.hybrid_layer_pattern)
    return f"--sffn-model gpt --num-layers {args.num_layers} --sffn-layers {args.sffn_layers}"


def saved_layer(saved: Namespace) -> SparseFFNConfig:
    """The sparse layer of a checkpoint that has one."""
    sffn = saved_config(saved)
    assert sffn is not None, saved.sffn_router
    return sffn


def router_differences(
    sffn: SparseFFNConfig, saved_sffn: SparseFFNConfig, *, training_only: bool
) -> Iterator[tuple[str, str]]:
    """The routers' flags that differ: those of the model, or those that act in training only."""
    # The routers' names are compared before.
    for router, saved_router in zip(sffn.routers, saved_sffn.routers, strict=True):
        for field in dataclasses.fields(router):
            value, saved_value = (getattr(config, field.name) for config in (router, saved_router))
            differs = value != saved_value
            if field.metadata["value_in_checkpoint"]:
                differs = (value is None) is not (saved_value is None)
            if differs and field.metadata["training_only"] is training_only:
                flag = field.metadata["flag"]
                yield stated(flag, value), stated(flag, saved_value)


Text = Callable[[Namespace], str | None]
"""A flag of the model as the user would type it; None if the arguments do not have it."""


def _differences(texts: list[Text], args: Namespace, saved: Namespace) -> Iterator[tuple[str, str]]:
    """Flags that this run and the checkpoint both have, where they differ."""
    for text in texts:
        flag, saved_flag = text(args), text(saved)
        if flag is not None and saved_flag is not None and flag != saved_flag:
            yield flag, saved_flag


def _with_value(dest: str) -> Text:
    """A flag and its value, or its absence."""

    def text(args: Namespace) -> str | None:
        value = vars(args).get(dest)
        if dest == "num_query_groups" and not vars(args).get("group_query_attention"):
            value = vars(args).get("num_attention_heads")
        return stated(flag_of(dest), value) if dest in vars(args) else None

    return text


def _switch(dest: str) -> Text:
    """A flag without a value, or its absence."""

    def text(args: Namespace) -> str | None:
        if dest not in vars(args):
            return None
        return stated(flag_of(dest), bool(vars(args)[dest]) is not (dest in INVERTED))

    return text


def _activation(args: Namespace) -> str:
    """The flag of the activation."""
    flags = [flag_of(dest) for dest in ACTIVATIONS if vars(args).get(dest)]
    return " ".join(flags) or "GELU (none of --swiglu, --squared-relu, --sffn-relu)"


def _prices(args: Namespace) -> str:
    """The flag of quantile balancing, whose prices act on every choice of a trained model."""
    is_on = vars(args).get("moe_router_load_balancing_type") == QUANTILE_BALANCING
    return f"{'' if is_on else 'no '}--moe-router-load-balancing-type {QUANTILE_BALANCING}"
