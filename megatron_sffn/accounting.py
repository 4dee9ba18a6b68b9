"""What a model costs before it is built: parameters and FLOPs in closed form. Numbers only.

Enters: the model's sizes (`ModelShape`) and the sparse layer's config. Leaves: exact counts, and
the table that a run prints when it starts. Neither tensors nor Megatron are imported.

Choices
- One multiply-add is 2 FLOPs; only matrix products count, and no work that all tokens share.
- The convention of arXiv 2305.13999, so that its numbers come out: attention spans all of
  `seq_length` (no causal halving), and selection trains at the price of any product, although
  Avg-K's and VanillaM's has no backward. Training a dense model with recomputation then costs
  `96·l·h²·(1 + s/(6h) + V/(16·l·h))` per token (Narayanan et al. 2021).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_sffn.traffic import (
    DISPATCHERS,
    exchanged_bytes_per_token,
    megatron_bytes_per_token,
)

if TYPE_CHECKING:
    from argparse import Namespace

    from megatron_sffn.config import Exchange, SparseFFNConfig


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes of a GPT that its counts depend on.

    Args:
        num_layers: transformer layers of all pipeline stages.
        hidden_size: D.
        ffn_hidden_size: cells of a dense layer's MLP.
        num_attention_heads: query heads.
        kv_channels: width of a head.
        seq_length: tokens of a sequence.
        padded_vocab_size: rows of the embedding.
        num_query_groups: key-value heads; None for one per query head.
        gated: SwiGLU, which gives every cell a second key.
        bias: of all linear layers but the sparse ones, which have none.
        qkv_bias: of the query, key and value projection, also without `bias`.
        layernorm: LayerNorm, with a bias; False for RMSNorm, without.
        qk_layernorm: whether queries and keys are normalised per head.
        tied_embeddings: whether the logits use the embedding's weights.
        learned_positions: rows of a learned position embedding; 0 for RoPE or none.
        sparse_layers: how many of the layers are sparse.
        sffn: the sparse layer; None if all layers are dense.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    kv_channels: int
    seq_length: int
    padded_vocab_size: int
    num_query_groups: int | None = None
    gated: bool = False
    bias: bool = True
    qkv_bias: bool = False
    layernorm: bool = True
    qk_layernorm: bool = False
    tied_embeddings: bool = True
    learned_positions: int = 0
    sparse_layers: int = 0
    sffn: SparseFFNConfig | None = None

    def __post_init__(self) -> None:
        least, most = (0, 0) if self.sffn is None else (1, self.num_layers)
        assert least <= self.sparse_layers <= most, (self.sparse_layers, self.num_layers, self.sffn)

    @classmethod
    def of_args(cls, args: Namespace, sffn: SparseFFNConfig | None) -> ModelShape:
        """The shape that Megatron's arguments describe.

        Args:
            args: validated, and with the padded vocabulary size that the tokenizer gives.
            sffn: the sparse layer of the layers in `args.moe_layer_freq`, a list; None if all
                layers are dense.
        """
        assert args.padded_vocab_size is not None, "build the tokenizer first: it pads"
        learned = args.position_embedding_type == "learned_absolute"
        return cls(
            num_layers=args.num_layers,
            hidden_size=args.hidden_size,
            ffn_hidden_size=args.ffn_hidden_size,
            num_attention_heads=args.num_attention_heads,
            kv_channels=args.kv_channels,
            seq_length=args.seq_length,
            padded_vocab_size=args.padded_vocab_size,
            num_query_groups=args.num_query_groups if args.group_query_attention else None,
            gated=args.swiglu,
            bias=args.add_bias_linear,
            qkv_bias=args.add_qkv_bias,
            layernorm=args.normalization == "LayerNorm",
            qk_layernorm=args.qk_layernorm,
            tied_embeddings=not args.untie_embeddings_and_output_weights,
            learned_positions=args.max_position_embeddings if learned else 0,
            sparse_layers=sum(args.moe_layer_freq) if sffn is not None else 0,
            sffn=sffn,
        )

    @property
    def query_width(self) -> int:
        """Width of all queries, and of their answers."""
        return self.num_attention_heads * self.kv_channels

    @property
    def key_value_width(self) -> int:
        """Width of all keys plus all values."""
        return 2 * (self.num_query_groups or self.num_attention_heads) * self.kv_channels

    @property
    def cell_vectors(self) -> int:
        """Vectors of a cell: a key and a value, and a gate key if gated."""
        return 3 if self.gated else 2


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Parameters: `total`, and `active` with K instead of B blocks in each sparse layer."""

    total: int
    active: int


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Forward FLOPs of a model per token: `feed_forward` is dense MLPs and chosen blocks."""

    attention: int
    feed_forward: int
    router: int
    logits: int

    @property
    def total(self) -> int:
        """Their sum."""
        return self.attention + self.feed_forward + self.router + self.logits


def dense_equivalent(shape: ModelShape) -> ModelShape:
    """The same model without sparse layers: of equal block compute if k is `ffn_hidden_size`."""
    return dataclasses.replace(shape, sffn=None, sparse_layers=0)


def count_parameters(shape: ModelShape) -> Parameters:
    """Parameters of Megatron's GPT of this shape."""
    width = shape.hidden_size
    vocabulary = (1 if shape.tied_embeddings else 2) * shape.padded_vocab_size
    rest = (vocabulary + shape.learned_positions) * width + _norm(shape, width)
    rest += shape.num_layers * (_attention_parameters(shape) + 2 * _norm(shape, width))
    rest += (shape.num_layers - shape.sparse_layers) * _mlp_parameters(shape)
    if shape.sffn is None:
        return Parameters(total=rest, active=rest)
    rest += shape.sparse_layers * shape.sffn.router.parameters(shape.sffn, width)
    per_cell = shape.sparse_layers * shape.cell_vectors * width
    return Parameters(
        total=rest + per_cell * shape.sffn.num_cells,
        active=rest + per_cell * shape.sffn.active_cells,
    )


def _norm(shape: ModelShape, width: int) -> int:
    """Parameters of one normalisation."""
    return (2 if shape.layernorm else 1) * width


def _attention_parameters(shape: ModelShape) -> int:
    """Of one layer: both projections, their biases, the norms of queries and keys."""
    projected = shape.query_width + shape.key_value_width
    count = (projected + shape.query_width) * shape.hidden_size
    count += projected if shape.bias or shape.qkv_bias else 0
    count += shape.hidden_size if shape.bias else 0
    count += 2 * _norm(shape, shape.kv_channels) if shape.qk_layernorm else 0
    return count


def _mlp_parameters(shape: ModelShape) -> int:
    """Of one dense MLP."""
    cells, width = shape.ffn_hidden_size, shape.hidden_size
    biases = (shape.cell_vectors - 1) * cells + width
    return shape.cell_vectors * cells * width + (biases if shape.bias else 0)


def flops_per_token(shape: ModelShape) -> Flops:
    """Forward FLOPs of the whole model for one token."""
    width, sparse = shape.hidden_size, shape.sparse_layers
    projections = 2 * width * (2 * shape.query_width + shape.key_value_width)
    scores_and_sum = 4 * shape.seq_length * shape.query_width
    cells, router = (shape.num_layers - sparse) * shape.ffn_hidden_size, 0
    if shape.sffn is not None:
        cells += sparse * shape.sffn.active_cells
        router = sparse * shape.sffn.router.flops(shape.sffn, width, gated=shape.gated)
    return Flops(
        attention=shape.num_layers * (projections + scores_and_sum),
        feed_forward=2 * shape.cell_vectors * width * cells,
        router=router,
        logits=2 * width * shape.padded_vocab_size,
    )


def training_flops_per_token(shape: ModelShape, *, recompute: bool) -> int:
    """FLOPs of forward and backward (two forwards) for one token.

    Args:
        shape: of the model.
        recompute: whether the layers run forward once more in the backward, as in Megatron's full
            activation recomputation; the logits never do.
    """
    forward = flops_per_token(shape)
    return 3 * forward.total + (forward.total - forward.logits if recompute else 0)


def overhead_over_dense(shape: ModelShape) -> float:
    """Forward FLOPs over those of the dense equivalent, minus 1."""
    return flops_per_token(shape).total / flops_per_token(dense_equivalent(shape)).total - 1


def table(shape: ModelShape, exchange: Exchange | None = None, dispatcher: str = "alltoall") -> str:
    """The costs of a model, as the text that a run prints when it starts.

    Args:
        shape: of the model.
        exchange: of its sparse layers; if there are several ranks, the bytes are shown.
        dispatcher: how they exchange tokens.
    """
    parameters, sffn = count_parameters(shape), shape.sffn
    title = f"feed-forward: dense, {shape.ffn_hidden_size} cells in {shape.num_layers} layers"
    rows = {
        "parameters": _human(parameters.total),
        "active parameters": _human(parameters.active),
        "FLOPs per token, forward": _human(flops_per_token(shape).total),
        "FLOPs over dense": f"{100 * overhead_over_dense(shape):+.3g} %",
    }
    if sffn is not None:
        title = (
            f"sparse feed-forward: {sffn.router.name}, {sffn.num_active_blocks} of "
            f"{sffn.num_blocks} blocks of {sffn.block_size} cells (E = {sffn.expansion}) in "
            f"{shape.sparse_layers} of {shape.num_layers} layers"
        )
    if sffn is not None and exchange is not None and exchange.num_ranks > 1:
        if sffn.backend != "megatron":
            ours = exchanged_bytes_per_token(sffn, shape.hidden_size, exchange, dispatcher)
            rows[f"sent per token and layer, {dispatcher}"] = f"{_human(ours)}B"
        for theirs in DISPATCHERS:
            number = megatron_bytes_per_token(sffn, shape.hidden_size, exchange, theirs)
            rows[f"  with Megatron's {theirs}"] = f"{_human(number)}B"
    width = max(map(len, rows))
    return "\n".join((title, *(f"  {name:<{width}}  {text:>9}" for name, text in rows.items())))


def _human(number: float) -> str:
    """12345678 as `12.3 M`, ready for a unit; 512 as `512 `."""
    for power, letter in ((4, "T"), (3, "G"), (2, "M"), (1, "k")):
        if number >= 1000**power:
            return f"{number / 1000**power:.1f} {letter}"
    return f"{number:.0f} "
