"""Names and shapes of tensors: our checkpoint on the left, an architecture of transformers right.

Inputs: the tensors of a checkpoint, every layer by itself (`checkpoints.tensors.by_layer`), or
those of a Hugging Face folder. Outputs: the same weights by the names of the other side.

Design notes: the tables are data, and export and import read the same rows in the two directions. A
row names one tensor of the checkpoint, the tensors of the architecture that hold its numbers, and
the reshape between them. A tensor without a row is an error, so that no weight is lost in silence.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import count

from torch import Tensor

from megatron_sffn.hf.reshapes import RESHAPES, Sizes
from megatron_sffn.utils.errors import ConfigError


@dataclass(frozen=True)
class Row:
    """A tensor of the checkpoint, and where the architecture has its numbers.

    Args:
        ours: name in the checkpoint, with `{layer}`.
        theirs: names in the architecture, with `{layer}`, and with `{block}` in a name that stands
            for one tensor per block.
        reshape: key of `RESHAPES`.
    """

    ours: str
    theirs: tuple[str, ...]
    reshape: str = "same"


OURS, THEIRS = "decoder.layers.{layer}.", "model.layers.{layer}."


def _rows(prefix: str, pairs: Mapping[str, str], ours: str = OURS) -> list[Row]:
    """Rows of tensors that have the same shape on both sides."""
    return [Row(f"{ours}{mine}", (f"{prefix}{theirs}",)) for mine, theirs in pairs.items()]


def _with_bias(*rows: Row) -> list[Row]:
    """Rows of weights, and the same rows for their biases."""
    return [
        Row(
            row.ours.replace(".weight", end),
            tuple(name.replace(".weight", end) for name in row.theirs),
            row.reshape,
        )
        for row in rows
        for end in (".weight", ".bias")
    ]


EMBEDDINGS = [
    Row("embedding.word_embeddings.weight", ("model.embed_tokens.weight",)),
    Row("output_layer.weight", ("lm_head.weight",)),
    *_with_bias(Row("decoder.final_layernorm.weight", ("model.norm.weight",))),
]


def _norms(prefix: str, attention: str, mlp: str) -> list[Row]:
    """The two norms of a layer, which Megatron keeps with the linear layer that follows."""
    return [
        Row(f"{OURS}{place}_{kind}", (f"{prefix}{name}.{kind}",))
        for place, name in (
            ("self_attention.linear_qkv.layer_norm", attention),
            ("mlp.linear_fc1.layer_norm", mlp),
        )
        for kind in ("weight", "bias")
    ] + [
        # Transformer Engine's layer keeps the norm of a sparse layer apart.
        Row(f"{OURS}pre_mlp_layernorm.{kind}", (f"{prefix}{mlp}.{kind}",))
        for kind in ("weight", "bias")
    ]


LAYER = [
    *_norms(THEIRS, "input_layernorm", "post_attention_layernorm"),
    *_with_bias(
        Row(
            f"{OURS}self_attention.linear_qkv.weight",
            tuple(f"{THEIRS}self_attn.{part}_proj.weight" for part in "qkv"),
            "qkv",
        ),
        Row(f"{OURS}self_attention.linear_proj.weight", (f"{THEIRS}self_attn.o_proj.weight",)),
        Row(f"{OURS}self_attention.q_layernorm.weight", (f"{THEIRS}self_attn.q_norm.weight",)),
        Row(f"{OURS}self_attention.k_layernorm.weight", (f"{THEIRS}self_attn.k_norm.weight",)),
    ),
]


def _mlp(gated: bool, ours: str, theirs: str) -> list[Row]:
    """A dense FFN as Llama names it, without a gate projection where there is none."""
    first = (f"{theirs}gate_proj.weight", f"{theirs}up_proj.weight")
    return _with_bias(
        Row(f"{ours}linear_fc1.weight", first, "halves")
        if gated
        else Row(f"{ours}linear_fc1.weight", first[1:]),
        Row(f"{ours}linear_fc2.weight", (f"{theirs}down_proj.weight",)),
    )


def _llama(sizes: Sizes) -> list[Row]:
    return [*EMBEDDINGS, *LAYER, *_mlp(sizes.gated, f"{OURS}mlp.", f"{THEIRS}mlp.")]


def _experts(mlp: str, gate: str, up: str, down: str) -> list[Row]:
    """Blocks as experts."""
    expert = f"{THEIRS}{mlp}.experts.{{block}}."
    return [
        Row(f"{OURS}mlp.experts.gate_keys", (f"{expert}{gate}.weight",), "blocks"),
        Row(f"{OURS}mlp.experts.keys", (f"{expert}{up}.weight",), "blocks"),
        Row(f"{OURS}mlp.experts.values", (f"{expert}{down}.weight",), "blocks, transposed"),
    ]


def _gate(name: str) -> Row:
    return Row(f"{OURS}mlp.router.weight", (f"{THEIRS}{name}.weight",))


NAMED_AS_QWEN = _experts("mlp", "gate_proj", "up_proj", "down_proj")


def _qwen3_moe(sizes: Sizes) -> list[Row]:
    return [*_llama(sizes), *NAMED_AS_QWEN, _gate("mlp.gate")]


def _glm4_moe(sizes: Sizes) -> list[Row]:
    bias = f"{THEIRS}mlp.gate.e_score_correction_bias"
    shared = _mlp(sizes.gated, f"{OURS}mlp.shared_experts.", f"{THEIRS}mlp.shared_experts.")
    return [*_qwen3_moe(sizes), *shared, Row(f"{OURS}mlp.router.balance.expert_bias", (bias,))]


def _mixtral(sizes: Sizes) -> list[Row]:
    experts = _experts("block_sparse_moe", "w1", "w3", "w2")
    return [*EMBEDDINGS, *LAYER, *experts, _gate("block_sparse_moe.gate")]


def _qwen2_moe(sizes: Sizes) -> list[Row]:
    shared, theirs = f"{OURS}mlp.shared_experts.", f"{THEIRS}mlp.shared_expert."
    first = tuple(f"{theirs}{part}_proj.weight" for part in ("gate", "up"))
    last = (f"{theirs}down_proj.weight", f"{THEIRS}mlp.shared_expert_gate.weight")
    return [
        *_llama(sizes),
        *NAMED_AS_QWEN,
        _gate("mlp.gate"),
        Row(f"{shared}linear_fc1.weight", first, "halves"),
        Row(f"{shared}linear_fc2.weight", last, "behind a gate of one half"),
    ]


def _gpt_neox(sizes: Sizes) -> list[Row]:
    theirs = "gpt_neox.layers.{layer}."
    return [
        Row("embedding.word_embeddings.weight", ("gpt_neox.embed_in.weight",)),
        Row("output_layer.weight", ("embed_out.weight",)),
        *_with_bias(Row("decoder.final_layernorm.weight", ("gpt_neox.final_layer_norm.weight",))),
        *_norms(theirs, "input_layernorm", "post_attention_layernorm"),
        *_with_bias(
            *_rows(
                theirs,
                {
                    # With as many query groups as heads, both have query, key, value by head.
                    "self_attention.linear_qkv.weight": "attention.query_key_value.weight",
                    "self_attention.linear_proj.weight": "attention.dense.weight",
                    "mlp.linear_fc1.weight": "mlp.dense_h_to_4h.weight",
                    "mlp.linear_fc2.weight": "mlp.dense_4h_to_h.weight",
                },
            )
        ),
    ]


def _starcoder2(sizes: Sizes) -> list[Row]:
    pairs = {"linear_fc1.weight": "mlp.c_fc.weight", "linear_fc2.weight": "mlp.c_proj.weight"}
    mlp = _with_bias(*_rows(THEIRS, pairs, ours=f"{OURS}mlp."))
    return [*EMBEDDINGS, *LAYER, *mlp]


ROUTER_TENSORS = (
    "weight",
    "hidden",
    "down",
    "query",
    "query_bias",
    "subkeys",
    "query_norm",
    "output_gate",
    "output_projection",
    "descriptor.weight",
    "descriptor.average",
    "descriptor.started",
    "map",
)
"""Weights and buffers of our routers that a trained model needs."""

BALANCE_TENSORS = ("expert_bias", "qb_beta")
"""Buffers of load balancing that act on the choice of a trained model."""


def _sparse_ffn(sizes: Sizes) -> list[Row]:
    """Our own class: tables of cells, as the checkpoint has them."""
    mlp = f"{OURS}mlp."
    shared = _mlp(sizes.gated, f"{mlp}shared_experts.", f"{THEIRS}mlp.shared_blocks.")
    tables = {f"experts.{name}": f"mlp.{name}" for name in ("gate_keys", "keys", "values")}
    router = {f"router.{name}": f"mlp.router.{name.replace('.', '_')}" for name in ROUTER_TENSORS}
    router |= {f"router.balance.{name}": f"mlp.router.{name}" for name in BALANCE_TENSORS}
    positions = ("model.embed_positions.weight",)
    return [
        *_llama(sizes),
        *shared,
        *_rows(THEIRS, tables | router, ours=mlp),
        Row("embedding.position_embeddings.weight", positions),
    ]


SPARSE_FFN = "sparse_ffn"
"""The architecture of `modeling_sparse_ffn.py`."""

TABLES: dict[str, Callable[[Sizes], list[Row]]] = {
    "llama": _llama,
    "qwen2": _llama,
    "qwen3": _llama,
    "gpt_neox": _gpt_neox,
    "starcoder2": _starcoder2,
    "mixtral": _mixtral,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
    "glm4_moe": _glm4_moe,
    SPARSE_FFN: _sparse_ffn,
}
"""`model_type` of transformers -> its rows."""

TRAINING_ONLY = re.compile(
    r"decoder\.layers\.\d+\.mlp\.router\.(noise_weight|balance\.l1_coefficient)|mtp\..*"
)
"""Tensors that act in training only: an export leaves them out."""

LAYER_NUMBER = re.compile(r"(?<=\.layers\.)(\d+)(?=\.)")


def to_architecture(
    tensors: Mapping[str, Tensor], architecture: str, sizes: Sizes
) -> dict[str, Tensor]:
    """Rename and reshape the tensors of a checkpoint.

    Args:
        tensors: of the checkpoint, every layer by itself.
        architecture: a key of `TABLES`.
        sizes: of the model.

    Raises:
        ConfigError: if a tensor has no place in the architecture.
    """
    rows = {row.ours: row for row in TABLES[architecture](sizes)}
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if TRAINING_ONLY.fullmatch(name):
            continue
        row = rows.get(LAYER_NUMBER.sub("{layer}", name))
        if row is None:
            raise ConfigError(
                f"tensor {name} of the checkpoint has no place in the architecture {architecture}; "
                "export a model without it"
            )
        layer = LAYER_NUMBER.search(name)
        parts = RESHAPES[row.reshape].split(tensor, sizes)
        names = _names(row, layer[0] if layer else "", len(parts))
        renamed |= dict(zip(names, parts, strict=True))
    return renamed


def to_checkpoint(
    tensors: Mapping[str, Tensor], architecture: str, sizes: Sizes
) -> dict[str, Tensor]:
    """Rename and reshape the tensors of a Hugging Face folder, every layer by itself.

    Args:
        tensors: of the folder.
        architecture: a key of `TABLES`.
        sizes: of the model.

    Raises:
        ConfigError: if a part of a tensor is missing, or a tensor is unknown.
    """
    left = dict(tensors)
    renamed = {}
    for row in TABLES[architecture](sizes):
        layers = range(sizes.num_layers) if "{layer}" in row.ours else [0]
        for layer in layers:
            names = _names(row, str(layer), None if _per_block(row) else len(row.theirs), left)
            if not names or names[0] not in left:
                continue
            missing = [name for name in names if name not in left]
            if missing or (_per_block(row) and len(names) != sizes.num_blocks):
                absent = missing[0] if missing else f"number {len(names)} of {row.theirs[0]}"
                raise ConfigError(f"tensor {absent} is missing; give a folder with all shards")
            parts = [left.pop(name) for name in names]
            whole = RESHAPES[row.reshape].join(parts, sizes)
            if whole.numel():  # an export has empty tensors where a class demands shared experts
                renamed[row.ours.format(layer=layer)] = whole
    if left:
        raise ConfigError(
            f"tensor {min(left)} is not one of architecture {architecture}; give a model of it"
        )
    return renamed


def _per_block(row: Row) -> bool:
    return "{block}" in row.theirs[0]


def _names(row: Row, layer: str, parts: int | None, known: Iterable[str] = ()) -> list[str]:
    """Names of a row's tensors in the architecture; `parts` is None for as many as are known."""
    if not _per_block(row):
        return [name.format(layer=layer) for name in row.theirs]
    (pattern,) = row.theirs
    blocks = count() if parts is None else range(parts)
    names = []
    for block in blocks:
        name = pattern.format(layer=layer, block=block)
        if parts is None and name not in known:
            break
        names.append(name)
    return names
