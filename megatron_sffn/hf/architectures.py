"""Which classes of transformers hold a model exactly, and the first setting that one does not hold.

Inputs: the settings of a model. Outputs: the fields of the configuration of an architecture,
or the reason why it cannot hold the model.

Design notes: `CLASSES` has one entry per architecture: what it needs, as sentences with a test, and
the fields of its configuration. An export claims a class only if every need is met, and a test
compares the logits of unmodified transformers with Megatron's for each class.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_sffn.flags.sffn_flags import ffn_hidden_size
from megatron_sffn.hf.names import SPARSE_FFN
from megatron_sffn.hf.needs import (
    ALL_HEADS,
    ALL_SPARSE,
    BIASES,
    DENSE,
    GROUPS_OF_TWO,
    HEADS_FILL,
    LAYER_NORM,
    LLAMA_LIKE,
    MOE_LIKE,
    NO_BIASES,
    NO_EXPERT_BIAS,
    NO_GROUPS,
    NO_PRICES,
    NO_QK_NORM,
    NO_QKV_BIAS,
    ONE_STRETCH,
    QK_NORM,
    QKV_BIAS,
    RMS_NORM,
    ROPE,
    SHARED,
    SPARSE_LAST,
    SWIGLU,
    UNGATED,
    WHOLE_ROPE,
    Need,
    gate_is,
)
from megatron_sffn.hf.own_fields import common_fields, sparse_ffn_fields
from megatron_sffn.hf.settings import Settings
from megatron_sffn.utils.errors import ConfigError

LLAMA_3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
"""Megatron's `--use-rope-scaling`, beside its factor; it stretches 8192 positions."""

Fields = Callable[[Settings], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class StockClass:
    """A class of transformers.

    Args:
        name: of the class.
        needs: what a model must have.
        fields: of its configuration, beside those that all have.
        filled: tensors that the class always has: name in our sparse layer -> shape.
    """

    name: str
    needs: tuple[Need, ...]
    fields: Fields
    filled: Callable[[Settings], dict[str, tuple[int, ...]]] = lambda settings: {}

    def obstacle(self, settings: Settings) -> str | None:
        """The first need that a model does not meet; None if the class is exact for it."""
        return next((text for text, is_met in self.needs if not is_met(settings)), None)


def _rope(settings: Settings) -> dict[str, Any]:
    args = settings.args
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(args.rotary_base)}
    if args.use_rope_scaling:
        factor = float(args.rope_scaling_factor)
        rope |= {"rope_type": "llama3", "factor": factor, **LLAMA_3}
        rope["original_max_position_embeddings"] = 8192
    elif args.rotary_seq_len_interpolation_factor:
        rope |= {"rope_type": "linear", "factor": float(args.rotary_seq_len_interpolation_factor)}
    if args.rotary_percent != 1.0:
        rope["partial_rotary_factor"] = args.rotary_percent
    return {"rope_parameters": rope}


def _llama(settings: Settings) -> dict[str, Any]:
    args = settings.args
    return {
        **common_fields(settings),
        **_rope(settings),
        "intermediate_size": ffn_hidden_size(args),
        "num_key_value_heads": settings.num_query_groups,
        "head_dim": args.kv_channels,
        "hidden_act": "silu",
        "rms_norm_eps": args.layernorm_epsilon,
        "attention_bias": bool(args.add_bias_linear),
        "mlp_bias": bool(args.add_bias_linear),
    }


def _without(fields: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}


def _moe(settings: Settings) -> dict[str, Any]:
    sffn = settings.sffn
    assert sffn is not None
    dense = sorted({*range(settings.args.num_layers)} - {*settings.sparse_layers})
    return {
        **_without(_llama(settings), "attention_bias", "mlp_bias"),
        "num_experts": sffn.num_blocks,
        "num_experts_per_tok": sffn.num_active_blocks,
        "moe_intermediate_size": sffn.block_size,
        "norm_topk_prob": settings.gate == "softmax-chosen",
        "mlp_only_layers": dense,
        "decoder_sparse_step": 1,
    }


def _qwen2_moe(settings: Settings) -> dict[str, Any]:
    assert settings.sffn is not None
    return {
        **_moe(settings),
        "qkv_bias": bool(settings.args.add_qkv_bias),
        "shared_expert_intermediate_size": settings.sffn.shared_cells,
    }


def _mixtral(settings: Settings) -> dict[str, Any]:
    sffn = settings.sffn
    assert sffn is not None
    return {
        **_without(_llama(settings), "attention_bias", "mlp_bias"),
        "num_local_experts": sffn.num_blocks,
        "num_experts_per_tok": sffn.num_active_blocks,
        "intermediate_size": sffn.block_size,
        "sliding_window": None,
    }


def _glm4_moe(settings: Settings) -> dict[str, Any]:
    args, sffn = settings.args, settings.sffn
    assert sffn is not None
    fields = _without(_moe(settings), "num_experts", "mlp_only_layers", "decoder_sparse_step")
    rope = dict(fields["rope_parameters"])
    rope.setdefault("partial_rotary_factor", 1.0)
    return {
        **fields,
        "rope_parameters": rope,
        "n_routed_experts": sffn.num_blocks,
        "n_shared_experts": sffn.shared_blocks,
        "norm_topk_prob": settings.gate == "sigmoid-chosen",
        "routed_scaling_factor": args.moe_router_topk_scaling_factor or 1.0,
        "n_group": args.moe_router_num_groups or 1,
        "topk_group": args.moe_router_group_topk or 1,
        "first_k_dense_replace": args.num_layers - len(settings.sparse_layers),
        "use_qk_norm": bool(args.qk_layernorm),
        "attention_bias": bool(args.add_qkv_bias),
        "num_nextn_predict_layers": 0,
    }


ACTIVATIONS_OF_TRANSFORMERS = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
    "squared_relu": "relu2",
}


def _gpt_neox(settings: Settings) -> dict[str, Any]:
    args = settings.args
    rope = dict(_rope(settings)["rope_parameters"])
    rope.setdefault("partial_rotary_factor", 1.0)
    return {
        **common_fields(settings),
        "rope_parameters": rope,
        "intermediate_size": ffn_hidden_size(args),
        "hidden_act": ACTIVATIONS_OF_TRANSFORMERS[settings.dense_activation],
        "layer_norm_eps": args.layernorm_epsilon,
        "hidden_dropout": args.hidden_dropout,
        "use_parallel_residual": False,
        "attention_bias": True,
    }


def _starcoder2(settings: Settings) -> dict[str, Any]:
    args = settings.args
    return {
        **common_fields(settings),
        **_rope(settings),
        "intermediate_size": ffn_hidden_size(args),
        "num_key_value_heads": settings.num_query_groups,
        "hidden_act": ACTIVATIONS_OF_TRANSFORMERS[settings.dense_activation],
        "norm_epsilon": args.layernorm_epsilon,
        "residual_dropout": args.hidden_dropout,
        "embedding_dropout": args.hidden_dropout,
        "use_bias": bool(args.add_bias_linear),
        "sliding_window": None,
    }


def _empty_shared(settings: Settings) -> dict[str, tuple[int, ...]]:
    """Shared experts without cells, for a class that always has them."""
    assert settings.sffn is not None
    if settings.sffn.shared_blocks:
        return {}
    width = settings.args.hidden_size
    return {
        "shared_experts.linear_fc1.weight": (0, width),
        "shared_experts.linear_fc2.weight": (width, 0),
    }


def _glm4_filled(settings: Settings) -> dict[str, tuple[int, ...]]:
    """No shared experts and a bias of zeros, where the model has neither."""
    assert settings.sffn is not None
    bias = {} if settings.biased else {"router.balance.expert_bias": (settings.sffn.num_blocks,)}
    return {**_empty_shared(settings), **bias}


CLASSES: dict[str, StockClass] = {
    "llama": StockClass(
        name="LlamaForCausalLM",
        needs=(DENSE, *LLAMA_LIKE, NO_QK_NORM, NO_QKV_BIAS),
        fields=_llama,
    ),
    "qwen2": StockClass(
        name="Qwen2ForCausalLM",
        needs=(DENSE, *MOE_LIKE, HEADS_FILL, NO_QK_NORM, QKV_BIAS),
        fields=lambda s: _without(_llama(s), "attention_bias", "mlp_bias"),
    ),
    "qwen3": StockClass(
        name="Qwen3ForCausalLM",
        needs=(DENSE, *MOE_LIKE, QK_NORM, NO_QKV_BIAS),
        fields=lambda s: _without(_llama(s), "mlp_bias"),
    ),
    "gpt_neox": StockClass(
        name="GPTNeoXForCausalLM",
        needs=(
            *(DENSE, LAYER_NORM, UNGATED, ROPE, ONE_STRETCH),
            *(BIASES, ALL_HEADS, HEADS_FILL, NO_QK_NORM),
        ),
        fields=_gpt_neox,
    ),
    "starcoder2": StockClass(
        name="Starcoder2ForCausalLM",
        needs=(
            *(DENSE, LAYER_NORM, UNGATED, ROPE, ONE_STRETCH, WHOLE_ROPE),
            *(HEADS_FILL, NO_QK_NORM, NO_QKV_BIAS),
        ),
        fields=_starcoder2,
    ),
    "qwen3_moe": StockClass(
        name="Qwen3MoeForCausalLM",
        needs=(
            *(gate_is("softmax", "softmax-chosen"), *MOE_LIKE, QK_NORM, NO_QKV_BIAS),
            *(SHARED, NO_EXPERT_BIAS, NO_PRICES, NO_GROUPS),
        ),
        fields=_moe,
    ),
    "mixtral": StockClass(
        name="MixtralForCausalLM",
        needs=(
            *(gate_is("softmax-chosen"), *MOE_LIKE, NO_QK_NORM, NO_QKV_BIAS),
            *(SHARED, ALL_SPARSE, NO_EXPERT_BIAS, NO_PRICES, NO_GROUPS),
        ),
        fields=_mixtral,
    ),
    "qwen2_moe": StockClass(
        name="Qwen2MoeForCausalLM",
        needs=(
            *(gate_is("softmax", "softmax-chosen"), *MOE_LIKE, HEADS_FILL, NO_QK_NORM),
            *(NO_EXPERT_BIAS, NO_PRICES, NO_GROUPS),
        ),
        fields=_qwen2_moe,
        filled=_empty_shared,
    ),
    "glm4_moe": StockClass(
        name="Glm4MoeForCausalLM",
        needs=(
            *(gate_is("sigmoid", "sigmoid-chosen"), RMS_NORM, SWIGLU, ROPE, ONE_STRETCH, NO_BIASES),
            *(SPARSE_LAST, NO_PRICES, GROUPS_OF_TWO),
        ),
        fields=_glm4_moe,
        filled=_glm4_filled,
    ),
}
"""`model_type` -> class, in the order in which an export tries them."""


def choose_architecture(settings: Settings, wanted: str) -> tuple[str, str]:
    """The architecture of an export.

    Args:
        settings: of the model.
        wanted: an architecture, or `auto` for a stock class if one is exact, else ours.

    Returns:
        A key of `CLASSES`, or `SPARSE_FFN`; and why, in a clause.

    Raises:
        ConfigError: if the architecture does not hold the model exactly.
    """
    if wanted == SPARSE_FFN:
        return SPARSE_FFN, "as --architecture asks"
    obstacles = {name: stock.obstacle(settings) for name, stock in CLASSES.items()}
    exact = [name for name, obstacle in obstacles.items() if obstacle is None]
    if wanted != "auto":
        if obstacles[wanted] is not None:
            others = " or ".join([*exact, SPARSE_FFN])
            raise ConfigError(
                f"--architecture {wanted} does not hold this model exactly: "
                f"{CLASSES[wanted].name} {obstacles[wanted]}; use {others}"
            )
        return wanted, "as --architecture asks"
    if exact:
        return exact[0], f"{CLASSES[exact[0]].name} of transformers computes the same"
    nearest = _nearest(settings)
    return SPARSE_FFN, (
        f"no class of transformers computes the same; the nearest is {CLASSES[nearest].name}, "
        f"which {obstacles[nearest]}"
    )


def _nearest(settings: Settings) -> str:
    """The stock class whose first unmet need comes last."""

    def met(name: str) -> int:
        needs = [is_met(settings) for _, is_met in CLASSES[name].needs]
        return needs.index(False) if False in needs else len(needs)

    return max(CLASSES, key=met)


def config_fields(settings: Settings, architecture: str) -> dict[str, Any]:
    """The fields of the configuration of an architecture for a model that it holds."""
    if architecture == SPARSE_FFN:
        return sparse_ffn_fields(settings)
    return CLASSES[architecture].fields(settings)
