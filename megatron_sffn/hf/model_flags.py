"""The model flags of a run for the configuration of a Hugging Face model.

Inputs: a configuration with all defaults. Outputs: the architecture whose names its tensors have,
and the flags with which `megatron_sffn.pretrain` builds the same model.

Design notes: this is the way back of `architectures.py` and `own_fields.py`. No list of supported
values is kept: the configuration that an export of the flags' model would have is compared with the
configuration that was read, field by field (`check_exact`), so that a field which these functions
do not carry over is refused by its name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from transformers import AutoConfig

from megatron_sffn.hf.architectures import CLASSES, config_fields
from megatron_sffn.hf.names import SPARSE_FFN
from megatron_sffn.hf.settings import POSITIONS, Settings
from megatron_sffn.nn.routers import ROUTERS
from megatron_sffn.nn.routers.scored import ScoredConfig
from megatron_sffn.utils.errors import ConfigError

Fields = dict[str, Any]

IRRELEVANT = frozenset(
    """
    architectures auto_map bos_token_id chunk_size_feed_forward classifier_dropout dtype
    embedding_dropout eos_token_id hidden_dropout id2label is_encoder_decoder label2id
    max_window_layers num_nextn_predict_layers output_attentions output_hidden_states
    output_router_logits pad_token_id pretraining_tp problem_type residual_dropout return_dict
    router_aux_loss_coef router_jitter_noise torch_dtype transformers_version use_cache
    _name_or_path
    """.split()  # noqa: SIM905 (as the lists of checkpoints/run_command.py)
)
"""Fields that do not change the logits of a model in evaluation."""


def _mistral(fields: Fields) -> Fields:
    """A Mistral without a window is a Llama."""
    window = fields.pop("sliding_window", None)
    if window is not None and window < fields["max_position_embeddings"]:
        raise ConfigError(
            f"config.json says sliding_window {window}, which no model of ours has; give a model "
            "without a window, as later versions of Mistral are"
        )
    return fields


def _olmoe(fields: Fields) -> Fields:
    """OLMoE with one head is a Qwen3-MoE: its norms of queries and keys go over all heads."""
    heads = fields["num_attention_heads"]
    if heads > 1:
        raise ConfigError(
            f"OLMoE normalises queries and keys over all {heads} heads together, which Megatron "
            "does for each head by itself; give a model of another architecture, or of one head"
        )
    if fields.pop("clip_qkv", None) is not None:
        raise ConfigError(
            "config.json says clip_qkv, which no model of ours has; use a model without"
        )
    return {
        **fields,
        "moe_intermediate_size": fields["intermediate_size"],
        "head_dim": fields["hidden_size"],
    }


SAME_AS: dict[str, tuple[str, Callable[[Fields], Fields]]] = {
    "mistral": ("llama", _mistral),
    "olmoe": ("qwen3_moe", _olmoe),
}
"""`model_type` -> the architecture that computes the same, and its fields."""

IMPORTED = (*CLASSES, *SAME_AS, SPARSE_FFN)
"""Values of `model_type` that an import reads."""


def known_architecture(fields: Fields) -> tuple[str, Fields]:
    """The architecture of `CLASSES`, or ours, that a configuration describes, and its fields.

    Args:
        fields: of the configuration, with all defaults.

    Raises:
        ConfigError: if there is none.
    """
    model_type = fields["model_type"]
    heads, width = fields["num_attention_heads"], fields["hidden_size"]
    if "head_dim" in fields and fields["head_dim"] is None:
        fields = {**fields, "head_dim": width // heads}
    if model_type in SAME_AS:
        architecture, change = SAME_AS[model_type]
        return architecture, {**change(dict(fields)), "model_type": architecture}
    return model_type, fields


def check_known(model_type: str) -> None:
    """Refuse an architecture that no import reads."""
    if model_type not in IMPORTED:
        raise ConfigError(
            f"model_type {model_type} is no architecture that can be imported; give a model of "
            f"{', '.join(IMPORTED)}"
        )


def flags_of_fields(architecture: str, fields: Fields) -> list[str]:
    """The model's flags, without those of its vocabulary and its dtype.

    Args:
        architecture: of `known_architecture`.
        fields: of the configuration, with all defaults.

    Raises:
        ConfigError: if sizes do not fit a model of ours.
    """
    own = architecture == SPARSE_FFN
    words = [*_sizes(fields), *(_own_model(fields) if own else _stock(architecture, fields))]
    return [str(word) for word in words]


def _sizes(fields: Fields) -> Iterator[Any]:
    heads, width = fields["num_attention_heads"], fields["hidden_size"]
    yield from ("--num-layers", fields["num_hidden_layers"], "--hidden-size", width)
    yield from ("--num-attention-heads", heads)
    groups = fields.get("num_key_value_heads") or heads
    if groups != heads:
        yield from ("--group-query-attention", "--num-query-groups", groups)
    if not fields.get("head_dim") and width % heads:
        raise ConfigError(
            f"config.json says hidden_size {width}, which {heads} heads do not divide; correct it"
        )
    yield from ("--kv-channels", fields.get("head_dim") or width // heads)
    context = fields["max_position_embeddings"]
    yield from ("--seq-length", context, "--max-position-embeddings", context)
    yield from ("--attention-dropout", fields.get("attention_dropout") or 0.0)
    yield from ("--hidden-dropout", fields.get("hidden_dropout") or 0.0)
    yield from ("--init-method-std", fields["initializer_range"])
    if not fields["tie_word_embeddings"]:
        yield "--untie-embeddings-and-output-weights"


def _number(value: float) -> str:
    """A number without a fraction, where it has none, for flags of whole numbers."""
    return str(int(value)) if float(value).is_integer() else repr(value)


def _layers(sparse: list[int], num_layers: int) -> str:
    return "every:1" if len(sparse) == num_layers else ",".join(map(str, sparse))


def _blocks(blocks: int, chosen: int, size: int, shared_cells: int) -> Iterator[Any]:
    """Flags of B blocks, of which K are chosen beside the shared cells."""
    if shared_cells % size:
        raise ConfigError(
            f"the shared expert has {shared_cells} cells, which are no whole blocks of {size}; "
            "give a model whose experts' width divides its shared expert's"
        )
    active = chosen + shared_cells // size
    if blocks % active:
        raise ConfigError(
            f"{blocks} experts are no multiple of the {active} that a token uses (shared ones "
            "included), as --sffn-expansion needs; give a model where they are"
        )
    yield from ("--sffn-block-size", size, "--sffn-active-cells", active * size)
    yield from ("--sffn-expansion", blocks // active)
    if shared_cells:
        yield from ("--sffn-shared-blocks", shared_cells // size)


# Classes of transformers


def _stock(architecture: str, fields: Fields) -> Iterator[Any]:
    layer_norm = architecture in ("gpt_neox", "starcoder2")
    epsilon = next(
        fields[name]
        for name in ("rms_norm_eps", "layer_norm_eps", "norm_epsilon")
        if name in fields
    )
    yield from ("--norm-epsilon", epsilon)
    yield from ("--normalization", "LayerNorm" if layer_norm else "RMSNorm")
    yield from _stock_activation(fields["hidden_act"]) if layer_norm else ["--swiglu"]
    yield from _stock_rope(fields)
    attention_bias = bool(fields.get("attention_bias", False))
    if not (fields.get("mlp_bias") or fields.get("use_bias") or architecture == "gpt_neox"):
        yield "--disable-bias-linear"
    if (
        architecture == "qwen2"
        or fields.get("qkv_bias")
        or (architecture == "glm4_moe" and attention_bias)
    ):
        yield "--add-qkv-bias"
    if architecture in ("qwen3", "qwen3_moe") or fields.get("use_qk_norm"):
        yield "--qk-layernorm"
    sparse = _sparse_layers(architecture, fields)
    yield from ("--ffn-hidden-size", fields["intermediate_size"])
    if not sparse:
        yield from ("--sffn-router", "dense")
        return
    yield from ("--sffn-layers", _layers(sparse, fields["num_hidden_layers"]))
    yield from _experts(architecture, fields)


def _stock_activation(name: str) -> list[str]:
    known = {
        "gelu": ["--no-bias-gelu-fusion"],
        "gelu_pytorch_tanh": [],
        "relu": ["--sffn-relu"],
        "relu2": ["--squared-relu"],
    }
    if name not in known:
        raise ConfigError(
            f"config.json says hidden_act {name}, which no model of ours has; give a model with "
            f"{', '.join(known)}"
        )
    return known[name]


def _stock_rope(fields: Fields) -> Iterator[Any]:
    rope = fields["rope_parameters"]
    yield from ("--position-embedding-type", "rope", "--rotary-base", _number(rope["rope_theta"]))
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        yield from ("--rotary-percent", rope["partial_rotary_factor"])
    kind = rope.get("rope_type", "default")
    if kind == "llama3":
        yield from ("--use-rope-scaling", "--rope-scaling-factor", rope["factor"])
    elif kind == "linear":
        yield from ("--rotary-seq-len-interpolation-factor", _number(rope["factor"]))


def _sparse_layers(architecture: str, fields: Fields) -> list[int]:
    layers = range(fields["num_hidden_layers"])
    if architecture == "glm4_moe":
        return [*layers[fields["first_k_dense_replace"] :]]
    if architecture == "mixtral":
        return [*layers]
    if architecture in ("qwen2_moe", "qwen3_moe"):
        dense, step = fields.get("mlp_only_layers") or [], fields.get("decoder_sparse_step", 1)
        return [layer for layer in layers if layer not in dense and (layer + 1) % step == 0]
    return []


def _experts(architecture: str, fields: Fields) -> Iterator[Any]:
    # transformers calls the number of experts by one of three names, whatever the class.
    names = ("n_routed_experts", "num_local_experts", "num_experts")
    experts = next(fields[name] for name in names if name in fields)
    size = fields["intermediate_size" if architecture == "mixtral" else "moe_intermediate_size"]
    shared = fields.get("shared_expert_intermediate_size", 0)
    if architecture == "glm4_moe":
        shared = fields["n_shared_experts"] * size
    yield from _blocks(experts, fields["num_experts_per_tok"], size, shared)
    if architecture == "glm4_moe":
        yield from ("--sffn-router", "sigma-moe")
        if fields["n_group"] > 1:
            yield from ("--moe-router-num-groups", fields["n_group"])
            yield from ("--moe-router-group-topk", fields["topk_group"])
    else:
        after = architecture == "mixtral" or fields["norm_topk_prob"]
        yield from ("--sffn-router", "softmax-after" if after else "softmax-before")


# Our own class


def _own_model(fields: Fields) -> Iterator[Any]:
    yield from ("--ffn-hidden-size", fields["intermediate_size"])
    yield from (
        "--normalization",
        fields["normalization"],
        "--norm-epsilon",
        fields["norm_epsilon"],
    )
    activations = {
        "relu": ["--sffn-relu"],
        "squared_relu": ["--squared-relu"],
        "swiglu": ["--swiglu"],
        "quick_geglu": ["--quick-geglu"],
    }
    yield from activations.get(fields["hidden_act"], [])
    if fields["hidden_act"] == "gelu" and fields["dense_act"] == "gelu":
        yield "--no-bias-gelu-fusion"
    if not fields["linear_bias"]:
        yield "--disable-bias-linear"
    if fields["qkv_bias"]:
        yield "--add-qkv-bias"
    if fields["qk_norm"]:
        yield "--qk-layernorm"
    yield from _own_positions(fields)
    sparse = fields["sparse_layers"] or []
    if not sparse:
        yield from ("--sffn-router", "dense")
        return
    yield from ("--sffn-layers", _layers(sparse, fields["num_hidden_layers"]))
    yield from _blocks(
        fields["num_blocks"],
        fields["num_active_blocks"],
        fields["block_size"],
        fields["shared_cells"],
    )
    yield from _own_router(fields)


def _own_positions(fields: Fields) -> Iterator[Any]:
    megatron_name = {name: flag for flag, name in POSITIONS.items()}[fields["position_embedding"]]
    yield from ("--position-embedding-type", megatron_name)
    if fields["position_embedding"] != "rope":
        return
    yield from ("--rotary-base", _number(fields["rotary_base"]))
    if fields["rotary_dim"] != fields["head_dim"]:
        yield from ("--rotary-percent", fields["rotary_dim"] / fields["head_dim"])
    if fields["rotary_interleaved"]:
        yield "--rotary-interleaved"
    if fields["rotary_interpolation"] != 1.0:
        yield from (
            "--rotary-seq-len-interpolation-factor",
            _number(fields["rotary_interpolation"]),
        )
    if fields["rotary_scaling_factor"] is not None:
        factor = fields["rotary_scaling_factor"]
        yield from ("--use-rope-scaling", "--rope-scaling-factor", factor)


OF_ROUTERS = {
    "descriptor": "--sffn-descriptor",
    "aggregator": "--sffn-aggregator",
    "key_rank": "--sffn-key-rank",
    "gate_network": "--sffn-gate-network",
    "gate_activation": "--sffn-gate-activation",
    "product_key_heads": "--sffn-pkm-heads",
    "product_key_size": "--sffn-product-key-size",
}
"""Field of our configuration -> the flag of a router."""


def _own_router(fields: Fields) -> Iterator[Any]:
    name = fields["router"]
    if name not in ROUTERS:
        raise ConfigError(
            f"config.json says router {name}, which this version of megatron-sffn does not have; "
            f"choose of {', '.join(ROUTERS)}"
        )
    router = ROUTERS[name]
    yield from ("--sffn-router", name)
    own_flags = {item.metadata["flag"] for item in dataclasses.fields(router)}
    for field, flag in OF_ROUTERS.items():
        if flag in own_flags:
            yield from (flag, fields[field])
    if "--sffn-gate-hidden-size" in own_flags and fields["gate_network"] != "linear":
        yield from ("--sffn-gate-hidden-size", fields["gate_hidden_size"])
    if fields["descriptor"] == "subset" and "--sffn-descriptor" in own_flags:
        yield from ("--sffn-descriptor-cells", fields["descriptor_cells"])
    if not issubclass(router, ScoredConfig):
        return
    if fields["gate"] != router.default_gate:
        yield from ("--sffn-gate", fields["gate"])
    if fields["expert_bias"]:
        yield "--moe-router-enable-expert-bias"
    if fields["num_groups"] > 1:
        yield from ("--moe-router-num-groups", fields["num_groups"])
        yield from ("--moe-router-group-topk", fields["group_topk"])


# Comparison


def check_exact(architecture: str, fields: Fields, settings: Settings) -> None:
    """Refuse a configuration that the model of its flags would not have.

    Args:
        architecture: of `known_architecture`.
        fields: of the configuration that was read.
        settings: of the model that the flags describe.

    Raises:
        ConfigError: with the first field that differs.
    """
    if architecture in CLASSES:
        obstacle = CLASSES[architecture].obstacle(settings)
        if obstacle is not None:
            raise ConfigError(
                f"an import of architecture {architecture} {obstacle}, which this config.json does "
                "not describe; give a model where it does"
            )
    described = AutoConfig.for_model(architecture, **config_fields(settings, architecture))
    ours = described.to_dict()
    for name in sorted(ours.keys() & fields.keys() - IRRELEVANT):
        read, held = _comparable(fields[name]), _comparable(ours[name])
        if read != held:
            raise ConfigError(
                f"config.json says {name} {fields[name]}, which no model of ours has (it would "
                f"have {ours[name]}); give a model without it"
            )


def _comparable(value: Any) -> Any:
    """A value in which fields that say what is the default anyway are left out."""
    if not isinstance(value, dict):
        return value
    defaults = {"partial_rotary_factor": 1.0, "rope_type": "default"}
    return {
        name: part
        for name, part in value.items()
        if part is not None and (name not in defaults or part != defaults[name])
    }
