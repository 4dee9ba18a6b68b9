"""The sizes of a GPT or a hybrid model that its costs depend on.

Inputs: Megatron's validated arguments, or the sizes themselves. Outputs: a `ModelShape`, from which
parameters, FLOPs and memory follow.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols

from megatron_sffn.accounting.latent_attention import LatentAttention
from megatron_sffn.accounting.recurrent import DeltaNet, Mamba
from megatron_sffn.nn.layer_pattern import (
    ATTENTION,
    count_attention,
    prediction_layers,
    recurrent_layers,
)

if TYPE_CHECKING:
    from argparse import Namespace

    from megatron_sffn.nn.config import SparseFFNConfig


class LayerCounts(NamedTuple):
    """How often a model has each kind of layer, of which a GPT has the first three."""

    attentions: int
    dense: int
    sparse: int
    mambas: int
    delta_nets: int

    @property
    def parts(self) -> int:
        """All of them, each of which has a norm."""
        return sum(self)

    def plus(self, other: LayerCounts) -> LayerCounts:
        """The layers of both."""
        return LayerCounts(*map(sum, zip(self, other, strict=True)))


def count_parts(symbols: str) -> LayerCounts:
    """The parts of layers that are written with the symbols of a hybrid model."""
    return LayerCounts(
        attentions=sum(symbols.count(symbol) for symbol in ATTENTION),
        dense=symbols.count(Symbols.MLP),
        sparse=symbols.count(Symbols.MOE),
        mambas=symbols.count(Symbols.MAMBA),
        delta_nets=symbols.count(Symbols.GDN),
    )


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes of a GPT or a hybrid model that its counts depend on.

    Args:
        num_layers: layers of all pipeline stages. A layer of a GPT has attention and a feed-forward
            part; a layer of a hybrid model has one of them.
        hidden_size: D.
        ffn_hidden_size: cells of a dense layer's MLP.
        num_attention_heads: query heads.
        kv_channels: width of a head.
        seq_length: tokens of a sequence.
        padded_vocab_size: rows of the embedding.
        num_query_groups: key-value heads; None for one per query head.
        gated: True for SwiGLU and quick GEGLU, which give every cell a second key.
        bias: True if linear layers have biases; sparse layers never have.
        qkv_bias: True if the query, key and value projection has a bias, also without `bias`.
        layernorm: True for LayerNorm, which has a bias; False for RMSNorm, which has none.
        qk_layernorm: True if queries and keys are normalised per head.
        output_gate: True if attention's output is gated, by a projection as wide as the queries.
        softmax_type: Megatron's name of attention's softmax: all but `vanilla` have a sink, a
            number beside a head's scores, which `learnable` trains.
        predicted_tokens: layers of multi-token prediction.
        prediction: the layers of each multi-token prediction, by the symbols of a hybrid model; in
            a GPT `*-` or `*E`.
        repeats_prediction: True if all tokens are predicted by one layer
            (`--mtp-use-repeated-layer`).
        tied_embeddings: True if the logits use the embedding's weights.
        learned_positions: rows of a learned position embedding; 0 for RoPE or none.
        sparse_layers: number of sparse layers.
        sffn: the sparse layer; None if all layers are dense.
        attention_layers: number of layers with attention in a hybrid model; None for a GPT.
        latent_attention: widths of multi-latent attention; None for attention of
            `num_query_groups` and `kv_channels`.
        recurrent: the symbols of a hybrid model's recurrent layers, such as `MMG`.
        mamba: sizes of its Mamba layers.
        delta_net: sizes of its gated delta nets.
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
    output_gate: bool = False
    softmax_type: str = "vanilla"
    predicted_tokens: int = 0
    prediction: str = ""
    repeats_prediction: bool = False
    tied_embeddings: bool = True
    learned_positions: int = 0
    sparse_layers: int = 0
    sffn: SparseFFNConfig | None = None
    attention_layers: int | None = None
    latent_attention: LatentAttention | None = None
    recurrent: str = ""
    mamba: Mamba = dataclasses.field(default_factory=Mamba)
    delta_net: DeltaNet = dataclasses.field(default_factory=DeltaNet)

    def __post_init__(self) -> None:
        least = 0 if self.sffn is None else 1
        assert least <= self.sparse_layers <= least * self.num_layers, (self.sparse_layers, self)
        assert self.dense_layers >= 0, self

    @classmethod
    def of_args(cls, args: Namespace, sffn: SparseFFNConfig | None) -> ModelShape:
        """The shape that Megatron's arguments describe.

        Args:
            args: validated, and with the padded vocabulary size that the tokenizer gives.
            sffn: the sparse layer of the layers in `args.moe_layer_freq`, a list; None if all
                layers are dense.
        """
        assert args.padded_vocab_size is not None, "build the tokenizer first: it pads"
        pattern = args.hybrid_layer_pattern
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
            gated=args.swiglu or args.quick_geglu,
            bias=args.add_bias_linear,
            qkv_bias=args.add_qkv_bias,
            layernorm=args.normalization == "LayerNorm",
            qk_layernorm=args.qk_layernorm,
            output_gate=args.attention_output_gate,
            softmax_type=args.softmax_type,
            predicted_tokens=args.mtp_num_layers or 0,
            prediction=prediction_of(args, sffn is not None),
            repeats_prediction=args.mtp_use_repeated_layer,
            tied_embeddings=not args.untie_embeddings_and_output_weights,
            learned_positions=args.max_position_embeddings if learned else 0,
            sparse_layers=sum(args.moe_layer_freq) if sffn is not None else 0,
            sffn=sffn,
            attention_layers=None if pattern is None else count_attention(pattern),
            latent_attention=_sizes(LatentAttention, args) if args.multi_latent_attention else None,
            recurrent="" if pattern is None else recurrent_layers(pattern),
            mamba=_sizes(Mamba, args),
            delta_net=_sizes(DeltaNet, args),
        )

    @property
    def attentions(self) -> int:
        """Number of layers with attention."""
        return self.num_layers if self.attention_layers is None else self.attention_layers

    @property
    def dense_layers(self) -> int:
        """Number of layers with a dense MLP."""
        others = (self.attention_layers or 0) + len(self.recurrent)
        return self.num_layers - others - self.sparse_layers

    def layers_with(self, predictions: int) -> LayerCounts:
        """The layers of the model and of that many multi-token predictions."""
        recurrent = count_parts(self.recurrent)
        model = LayerCounts(
            attentions=self.attentions,
            dense=self.dense_layers,
            sparse=self.sparse_layers,
            mambas=recurrent.mambas,
            delta_nets=recurrent.delta_nets,
        )
        return model.plus(count_parts(predictions * self.prediction))

    def by_router(self, predictions: int) -> list[LayersOfRouter]:
        """The sparse layers by their routers.

        Args:
            predictions: multi-token predictions whose layers count, too.
        """
        if self.sffn is None:
            return []
        layers = self.sffn.layers_by_router(self.layers_with(predictions).sparse)
        return [LayersOfRouter(replace(self, sffn=sffn), sffn, count) for sffn, count in layers]

    def sffn_of_layer(self, layer: str) -> SparseFFNConfig:
        """The config of one sparse layer.

        Args:
            layer: the layer's parts (`pipeline_stages.layer_parts`).
        """
        assert self.sffn is not None, "a dense model has no sparse layer"
        number = layer.partition(Symbols.MOE)[2]
        return self.sffn.with_router(self.sffn.routers[int(number or 0)])

    @property
    def prediction_layers(self) -> tuple[str, ...]:
        """The parts of each layer of a multi-token prediction: one layer in a GPT."""
        return (self.prediction,) if self.attention_layers is None else tuple(self.prediction)

    @property
    def own_predictions(self) -> int:
        """Number of multi-token predictions that have weights of their own."""
        return min(self.predicted_tokens, 1) if self.repeats_prediction else self.predicted_tokens

    @property
    def sinks(self) -> int:
        """Number of trained attention sinks: one logit for each head, or none."""
        return self.num_attention_heads if self.softmax_type == "learnable" else 0

    @property
    def query_width(self) -> int:
        """Width of all queries, and of attention's output."""
        return self.num_attention_heads * self.kv_channels

    @property
    def projected_width(self) -> int:
        """Width of the projection to queries, keys, values, and the output gate."""
        return self.query_width * (2 if self.output_gate else 1) + self.key_value_width

    @property
    def key_value_width(self) -> int:
        """Width of all keys plus all values."""
        return 2 * (self.num_query_groups or self.num_attention_heads) * self.kv_channels

    @property
    def keys_per_cell(self) -> int:
        """Keys of a cell: one, and a gate key for a gated activation."""
        return 2 if self.gated else 1

    @property
    def dense_cell(self) -> int:
        """Parameters of a cell of a dense MLP or a shared block: D for each key and value."""
        return (self.keys_per_cell + 1) * self.hidden_size

    @property
    def sparse_cell(self) -> int:
        """Parameters of a cell of a sparse layer, whose rows may be narrower than D."""
        assert self.sffn is not None, "a dense model has no sparse layer"
        key = self.sffn.key_width(self.hidden_size)
        return self.keys_per_cell * key + self.sffn.row_width(self.hidden_size)

    def tables(self, sparse_layers: int, predictions: int = 0) -> int:
        """Number of tables of keys and values.

        Args:
            sparse_layers: sparse layers of the model or of a pipeline stage, those of multi-token
                predictions included.
            predictions: number of multi-token predictions, whose layers have tables of their own.
        """
        assert self.sffn is not None, "a dense model has no sparse layer"
        predicted = predictions * self.prediction.count("E")
        return (sparse_layers - predicted) // self.sffn.layers_per_table + predicted

    @property
    def latent_projections(self) -> int:
        """Parameters of the two projections of a latent sparse layer; 0 in any other."""
        latent = None if self.sffn is None else self.sffn.latent_size
        return 2 * self.hidden_size * (latent or 0)

    @property
    def router_width(self) -> int:
        """Width of what the router of a sparse layer scores."""
        assert self.sffn is not None, "a dense model has no sparse layer"
        return self.sffn.router_width(self.hidden_size)


def prediction_of(args: Namespace, is_sparse: bool) -> str:
    """The layers of a multi-token prediction, by the symbols of a hybrid model."""
    if not args.mtp_num_layers:
        return ""
    if args.hybrid_layer_pattern is not None:
        return prediction_layers(args.hybrid_layer_pattern)[0]
    # Megatron takes the last layer of the GPT.
    return "*E" if is_sparse and args.moe_layer_freq[-1] else "*-"


def _sizes[Sizes: LatentAttention | Mamba | DeltaNet](kind: type[Sizes], args: Namespace) -> Sizes:
    """The sizes of a kind of layer in Megatron's arguments, whose names they have."""
    return kind(**{field.name: getattr(args, field.name) for field in dataclasses.fields(kind)})


def dense_equivalent(shape: ModelShape) -> ModelShape:
    """The same model without sparse layers; of equal block FLOPs if k is `ffn_hidden_size`."""
    prediction = shape.prediction.replace("E", "-")
    return dataclasses.replace(shape, sffn=None, sparse_layers=0, prediction=prediction)


class LayersOfRouter(NamedTuple):
    """The sparse layers of a model that have one router.

    Args:
        shape: shape of the model, as if all its sparse layers had this router.
        sffn: config of these layers.
        layers: how many there are.
    """

    shape: ModelShape
    sffn: SparseFFNConfig
    layers: int
