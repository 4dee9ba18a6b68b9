"""The settings of a checkpoint's model, and those that no exported class has.

Inputs: the arguments in a checkpoint. Outputs: what architectures, names and the model card ask of
them; one sentence for a setting that changes the model in a way that cannot be exported.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from typing import Any

from megatron_sffn.flags.megatron_flags import ACTIVATIONS
from megatron_sffn.flags.names import flag_of, stated
from megatron_sffn.flags.sffn_flags import saved_config
from megatron_sffn.hf.flag_words import layers_value
from megatron_sffn.hf.reshapes import Sizes
from megatron_sffn.nn.config import SparseFFNConfig
from megatron_sffn.nn.layer_pattern import gpt_pattern, layer_pattern
from megatron_sffn.nn.quantile_balancing import QUANTILE_BALANCING
from megatron_sffn.nn.routers.learned import LearnedConfig
from megatron_sffn.nn.routers.scored import ScoredConfig
from megatron_sffn.utils.errors import ConfigError

NOT_EXPORTED: dict[str, tuple[Any, ...]] = {
    "softmax_type": ("vanilla", None),
    "experimental_attention_variant": (None,),
    "multi_latent_attention": (False, None),
    "attention_output_gate": (False, None),
    "moe_latent_size": (None,),
    "sffn_layers_per_table": (1, None),
    "qk_l2_norm": (False, None),
    "window_size": (None,),
    "no_rope_freq": (None,),
    "apply_residual_connection_post_layernorm": (False, None),
    "use_mup": (False, None),
    "heterogeneous_layers_config_path": (None,),
    "heterogeneous_layers_config_encoded_json": (None,),
    "spec": (None,),
}
"""Flags (dest) that change the model in a way no exported class has -> the values that do not."""

POSITIONS = {"rope": "rope", "learned_absolute": "learned", "none": "none"}
"""Value of `--position-embedding-type` that is exported -> its name in our configuration."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A model, by the arguments of its checkpoint.

    Args:
        args: of the checkpoint.
        sffn: its sparse layers; None for a dense model.
        sparse_layers: their indices, from 0.
        hybrid_pattern: Megatron's `--hybrid-layer-pattern` of a checkpoint of a hybrid model, whose
            weights have other names; the arguments are those of the GPT with the same layers.
    """

    args: Namespace
    sffn: SparseFFNConfig | None
    sparse_layers: tuple[int, ...]
    hybrid_pattern: str | None = None

    @property
    def num_query_groups(self) -> int:
        """Heads of keys and values."""
        grouped = self.args.group_query_attention
        return int(self.args.num_query_groups if grouped else self.args.num_attention_heads)

    @property
    def activation(self) -> str:
        """Activation of the sparse layers, as `Activation` names it."""
        names = {"swiglu": "swiglu", "squared_relu": "squared_relu", "quick_geglu": "quick_geglu"}
        for dest in ACTIVATIONS:
            if vars(self.args).get(dest):
                return names.get(dest, "relu")
        return "gelu"

    @property
    def glu_clamp(self) -> float | None:
        """The clamp of the inputs of a gated activation; None for no clamp."""
        return vars(self.args).get("activation_func_clamp_value")

    @property
    def glu_offset(self) -> float:
        """The offset of the linear half of a gated activation."""
        return float(vars(self.args).get("glu_linear_offset") or 0.0)

    @property
    def dense_activation(self) -> str:
        """Activation of the dense layers: Megatron fuses bias and GELU in the form with tanh."""
        args = self.args
        fused = self.activation == "gelu" and args.add_bias_linear and args.bias_gelu_fusion
        return "gelu_tanh" if fused else self.activation

    @property
    def gated(self) -> bool:
        """True if a cell has a gate key."""
        return self.activation in ("swiglu", "quick_geglu")

    @property
    def position_embedding(self) -> str:
        """`rope`, `learned` or `none`."""
        name = POSITIONS[self.args.position_embedding_type]
        return "none" if name == "learned" and not self.args.add_position_embedding else name

    @property
    def context(self) -> int:
        """Positions that the model knows."""
        return int(self.args.max_position_embeddings or self.args.seq_length)

    @property
    def sizes(self) -> Sizes:
        """What the reshapes of its tensors need."""
        return Sizes(
            num_layers=self.args.num_layers,
            num_heads=self.args.num_attention_heads,
            num_query_groups=self.num_query_groups,
            num_blocks=0 if self.sffn is None else self.sffn.num_blocks,
            gated=self.gated,
        )

    @property
    def gate(self) -> str | None:
        """The gate of a linear gate network in all sparse layers; None for other routers."""
        router = None if self.sffn is None or self.sffn.other_routers else self.sffn.router
        is_linear = isinstance(router, LearnedConfig) and router.network == "linear"
        return router.gate if is_linear and isinstance(router, ScoredConfig) else None

    @property
    def biased(self) -> bool:
        """True if the routers have an expert bias."""
        routers = [] if self.sffn is None else self.sffn.routers
        scored = any(isinstance(router, ScoredConfig) for router in routers)
        return scored and bool(self.args.moe_router_enable_expert_bias)

    @property
    def priced(self) -> bool:
        """True if the routers have the prices of quantile balancing."""
        return vars(self.args).get("moe_router_load_balancing_type") == QUANTILE_BALANCING


def _as_gpt(args: Namespace) -> Namespace:
    """The arguments of the GPT with a hybrid model's layers.

    Raises:
        ConfigError: if there is no such GPT.
    """
    pattern = gpt_pattern(args.hybrid_layer_pattern)
    if pattern is None:
        raise ConfigError(
            f"--hybrid-layer-pattern {args.hybrid_layer_pattern} cannot be exported, since every "
            "exported class has a feed-forward part after each attention; the nearest is a model "
            "of layers *- and *E"
        )
    sparse = [layer for layer, is_sparse in enumerate(pattern) if is_sparse]
    layers = {
        "num_layers": len(pattern),
        "sffn_layers": layers_value(sparse, len(pattern)),
        "moe_layer_freq": pattern,
        "hybrid_layer_pattern": None,
    }
    return Namespace(**{**vars(args), **layers})


def settings_of(saved: Namespace, *, without_capacity: bool = False) -> Settings:
    """The settings of a checkpoint.

    Args:
        saved: its arguments.
        without_capacity: leave the capacity of Switch's blocks out.

    Raises:
        ConfigError: if a setting changes the model in a way that no exported class has.
    """
    defaults = {"sffn_router": "dense", "sffn_layers": "every:1", "sffn_relu": False}
    args = Namespace(**{**defaults, **vars(saved)})
    hybrid = vars(args).get("hybrid_layer_pattern")
    if hybrid is not None:
        args = _as_gpt(args)
    values = vars(args)
    for dest, harmless in NOT_EXPORTED.items():
        if values.get(dest) not in harmless:
            raise ConfigError(
                f"{stated(flag_of(dest), values[dest])} cannot be exported, since no exported "
                f"class computes it; the nearest is a model trained without {flag_of(dest)}"
            )
    if args.position_embedding_type not in POSITIONS:
        raise ConfigError(
            f"--position-embedding-type {args.position_embedding_type} cannot be exported; the "
            f"nearest is a model trained with rope"
        )
    capacity = values.get("moe_expert_capacity_factor")
    if args.sffn_router != "dense" and capacity is not None and not without_capacity:
        raise ConfigError(
            f"--moe-expert-capacity-factor {capacity} drops tokens by what else is in their batch, "
            "which no exported class does; add --without-capacity to export a model that drops none"
        )
    if values.get("sffn_hash_ngram", 1) > 1:
        raise ConfigError(
            f"--sffn-hash-ngram {values['sffn_hash_ngram']} cannot be exported, since no exported "
            "class hashes n-grams; the nearest is a model trained without --sffn-hash-ngram"
        )
    sffn = saved_config(args)
    if sffn is None and values.get("num_experts"):
        raise ConfigError(
            f"--num-experts {values['num_experts']} are experts of plain Megatron; export a "
            "checkpoint that megatron_sffn.pretrain saved"
        )
    pattern = [0] * args.num_layers
    if sffn is not None:
        pattern = layer_pattern(args.sffn_layers, args.num_layers)
    sparse = tuple(layer for layer, is_sparse in enumerate(pattern) if is_sparse)
    return Settings(args=args, sffn=sffn, sparse_layers=sparse, hybrid_pattern=hybrid)
