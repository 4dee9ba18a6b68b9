"""The model flags of a run for the configuration of a Hugging Face model.

Inputs: a configuration with all defaults. Outputs: the architecture whose names its tensors have,
and the flags with which `megatron_sffn.pretrain` builds the same model.

Design notes: `stock_flags.py` and `own_flags.py` have the flags of the classes. No list of
supported values is kept: the configuration that an export of the flags' model would have is
compared with the configuration that was read, field by field (`check_exact`), so that a field which
these functions do not carry over is refused by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from transformers import AutoConfig

from megatron_sffn.hf.architectures import CLASSES, config_fields
from megatron_sffn.hf.flag_words import Fields
from megatron_sffn.hf.names import SPARSE_FFN
from megatron_sffn.hf.own_flags import own_flags
from megatron_sffn.hf.settings import Settings
from megatron_sffn.hf.stock_flags import stock_flags
from megatron_sffn.utils.errors import ConfigError

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
    words = [*_sizes(fields), *(own_flags(fields) if own else stock_flags(architecture, fields))]
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
