"""What a class of transformers needs of a model, as sentences with a test."""

from __future__ import annotations

from collections.abc import Callable

from megatron_sffn.hf.settings import Settings
from megatron_sffn.nn.routers.scored import ScoredConfig

Need = tuple[str, Callable[[Settings], bool]]
"""A sentence with the architecture as its subject, and whether a model meets it."""

DENSE: Need = ("has dense layers only", lambda s: s.sffn is None)
RMS_NORM: Need = (
    "has --normalization RMSNorm",
    lambda s: s.args.normalization == "RMSNorm",
)
LAYER_NORM: Need = (
    "has --normalization LayerNorm",
    lambda s: s.args.normalization == "LayerNorm",
)
SWIGLU: Need = (
    "has --swiglu, without --activation-func-clamp-value and --glu-linear-offset",
    lambda s: s.activation == "swiglu" and s.glu_clamp is None and not s.glu_offset,
)
UNGATED: Need = ("has no gated activation", lambda s: not s.gated)
QK_NORM: Need = ("has --qk-layernorm", lambda s: bool(s.args.qk_layernorm))
NO_QK_NORM: Need = ("has no --qk-layernorm", lambda s: not s.args.qk_layernorm)
QKV_BIAS: Need = ("has --add-qkv-bias", lambda s: bool(s.args.add_qkv_bias))
NO_QKV_BIAS: Need = (
    "has no --add-qkv-bias beside --disable-bias-linear",
    lambda s: s.args.add_bias_linear or not s.args.add_qkv_bias,
)
BIASES: Need = ("has biases, no --disable-bias-linear", lambda s: bool(s.args.add_bias_linear))
NO_BIASES: Need = ("has --disable-bias-linear", lambda s: not s.args.add_bias_linear)
ROPE: Need = (
    "has --position-embedding-type rope",
    lambda s: s.position_embedding == "rope" and not s.args.rotary_interleaved,
)
WHOLE_ROPE: Need = ("rotates whole heads", lambda s: s.args.rotary_percent == 1.0)
ONE_STRETCH: Need = (
    "has one way to stretch positions",
    lambda s: not (s.args.use_rope_scaling and s.args.rotary_seq_len_interpolation_factor),
)
HEADS_FILL: Need = (
    "has --kv-channels = --hidden-size / --num-attention-heads",
    lambda s: s.args.kv_channels * s.args.num_attention_heads == s.args.hidden_size,
)
ALL_HEADS: Need = (
    "has keys and values for every head, no --group-query-attention",
    lambda s: s.num_query_groups == s.args.num_attention_heads,
)
SHARED: Need = (
    "has no --sffn-shared-blocks",
    lambda s: s.sffn is None or not s.sffn.shared_blocks,
)
ALL_SPARSE: Need = (
    "has sparse layers only",
    lambda s: len(s.sparse_layers) == s.args.num_layers,
)
SPARSE_LAST: Need = (
    "has its dense layers before its sparse ones",
    lambda s: s.sparse_layers == tuple(range(s.args.num_layers))[-len(s.sparse_layers) :],
)
NO_EXPERT_BIAS: Need = ("has no --moe-router-enable-expert-bias", lambda s: not s.biased)
NO_PRICES: Need = (
    "has no --moe-router-load-balancing-type quantile_balancing",
    lambda s: not s.priced,
)
NO_GROUPS: Need = (
    "has no --moe-router-num-groups",
    lambda s: (s.args.moe_router_num_groups or 1) == 1,
)
GROUPS_OF_TWO: Need = (
    "adds two scores of a group (--moe-router-topk / --moe-router-group-topk, --sffn-group-score "
    "largest), with an expert bias",
    lambda s: NO_GROUPS[1](s) or (s.biased and _scores_per_group(s) == 2),
)
UNSCALED: Need = (
    "has gates that are not scaled (no --moe-router-topk-scaling-factor)",
    lambda s: s.args.moe_router_topk_scaling_factor in (None, 1.0),
)


def _scores_per_group(settings: Settings) -> int:
    """How many scores of a group are added; 0 if it is their mean."""
    assert settings.sffn is not None and isinstance(settings.sffn.router, ScoredConfig)
    if settings.sffn.router.group_score == "mean":
        return 0
    return settings.sffn.num_active_blocks // settings.args.moe_router_group_topk


def gate_is(*gates: str) -> Need:
    """The need for one of some gates, of a linear gate network."""
    choices = " or ".join(gates)
    return f"has a linear gate network with --sffn-gate {choices}", lambda s: s.gate in gates


LLAMA_LIKE = (RMS_NORM, SWIGLU, ROPE, ONE_STRETCH, WHOLE_ROPE)
MOE_LIKE = (*LLAMA_LIKE, NO_BIASES, UNSCALED)
