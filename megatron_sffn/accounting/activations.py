"""Bytes that the layers keep for the backward pass of one microbatch on one rank.

Inputs: the model's shape, the parallel layout and the training setup. Outputs: bytes, by part of
the model. The formulas follow Korthikanti et al. 2022 (arXiv 2205.05198), but for Megatron's local,
unfused modules, whose attention keeps its `s²` scores.

Design notes
- Counted is what torch's autograd saves, each storage once. Not counted are tensors that exist only
  while a kernel runs, buffers of collectives, and the allocator's fragmentation.
- A tensor is counted where it is saved first: the residual stream in the norm that reads it, a
  norm's output in the linear layers behind it.
"""

from __future__ import annotations

from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols

from megatron_sffn.accounting.latent_attention import LatentAttention
from megatron_sffn.accounting.shape import ModelShape, count_parts
from megatron_sffn.accounting.sparse import saved_by_sparse_layer
from megatron_sffn.accounting.training_setup import TrainingSetup
from megatron_sffn.nn.parallel_layout import ParallelLayout
from megatron_sffn.nn.saved_bytes import FP32, LayerCall

IDS = 8
"""Bytes of a token id, a target or an index: int64."""


class Activations:
    """Activations of the parts of a model, in bytes per microbatch and rank.

    Args:
        shape: shape of the model.
        layout: layout of the ranks.
        setup: setup of the training.
    """

    def __init__(self, shape: ModelShape, layout: ParallelLayout, setup: TrainingSetup) -> None:
        self.shape, self.layout, self.setup = shape, layout, setup
        self.tokens = setup.micro_batch_size * shape.seq_length
        """Tokens of a microbatch, inside linear layers and attention."""
        self.own_tokens = self.tokens // (layout.tp if layout.sequence_parallel else 1)
        """Tokens of this rank in norms, dropouts and residuals: split by sequence parallelism."""
        self.number_bytes = layout.bytes_per_number
        self.norm_upcasts = not (shape.layernorm or setup.cuda) and layout.half_precision
        """True if a norm keeps an fp32 copy of its input."""
        self.mask_bytes = 1 if setup.cuda else layout.bytes_per_number
        """Bytes of a number of a dropout mask: on the CPU the mask has the model's dtype."""

    def hidden_states(self) -> int:
        """One tensor `[s, b, D]`, split by sequence parallelism."""
        return self.own_tokens * self.shape.hidden_size * self.number_bytes

    def norm(self, rows: int, width: int, *, input_is_kept: bool = False) -> int:
        """A normalisation, without its output.

        Args:
            rows: number of vectors that are normalised.
            width: width of a vector.
            input_is_kept: True if another operator keeps the input anyway.
        """
        vector = width * self.number_bytes
        if self.shape.layernorm:
            # The input, and the mean and the reciprocal std of each vector.
            statistics = 2 * (FP32 if self.setup.cuda else self.number_bytes)
            return rows * ((0 if input_is_kept else vector) + statistics)
        if self.setup.cuda:
            return rows * ((0 if input_is_kept else vector) + FP32)
        # On the CPU, torch's RMSNorm is composed of simpler functions in fp32: they keep the input,
        # the normalised vector and the reciprocal norm.
        input_is_kept = input_is_kept and not self.norm_upcasts
        return rows * ((0 if input_is_kept else width * FP32) + width * FP32 + FP32)

    def attention(self) -> int:
        """The attention of one layer with its norm, without its scores."""
        shape, tp = self.shape, self.layout.tp
        if shape.latent_attention is not None:
            return self._latent_attention(shape.latent_attention)
        heads = shape.num_attention_heads // tp
        groups = (shape.num_query_groups or shape.num_attention_heads) // tp
        head = shape.kv_channels
        query_bytes = self.tokens * heads * head * self.number_bytes
        gates = heads if shape.output_gate else 0
        qkv_bytes = self.tokens * (heads + gates + 2 * groups) * head * self.number_bytes
        count = self.norm(self.own_tokens, shape.hidden_size) + self.hidden_states()
        # Queries, keys and values are views of one product, unless RoPE or a norm writes new
        # queries and keys, or grouped keys and values are repeated for each query head.
        rewritten = self.setup.rope_width > 0 or shape.qk_layernorm
        repeated = groups < heads
        queries_keys_values = (rewritten or repeated, rewritten or repeated, repeated)
        count += sum(queries_keys_values) * query_bytes
        if not repeated or (shape.qk_layernorm and not self.norm_upcasts):
            count += qkv_bytes
        if shape.qk_layernorm:
            queries_are_kept = not repeated or groups == 1
            count += self.norm(self.tokens * heads, head, input_is_kept=queries_are_kept)
            count += self.norm(self.tokens * groups, head, input_is_kept=True)
        # The cosines and sines of RoPE, for queries and for keys.
        count += 4 * shape.seq_length * self.setup.rope_width * self.number_bytes
        # An output gate keeps its two factors: attention's output, and the sigmoid in fp32.
        count += self.tokens * gates * head * (self.number_bytes + FP32)
        # The input of the output projection.
        return count + query_bytes + self._hidden_mask()

    def _latent_attention(self, latent: LatentAttention) -> int:
        """Multi-latent attention of one layer with its norm, without its scores."""
        shape, tp = self.shape, self.layout.tp
        heads = shape.num_attention_heads // tp
        count = self.norm(self.own_tokens, shape.hidden_size) + self.hidden_states()
        # Latents, which the up projections keep, or the norms before them. They are views of the
        # gathered products, of which that of keys and values has the rotary part, too.
        ranks = [rank for rank in (latent.q_lora_rank, latent.kv_lora_rank) if rank is not None]
        numbers = self.tokens * (sum(ranks) + latent.qk_pos_emb_head_dim)
        if shape.qk_layernorm:
            numbers = (0 if self.norm_upcasts else numbers) + self.own_tokens * sum(ranks)
            count += sum(self.norm(self.own_tokens, rank, input_is_kept=True) for rank in ranks)
        # The input of the output projection.
        numbers += self.tokens * heads * latent.v_head_dim
        count += numbers * self.number_bytes + self._hidden_mask()
        if not self.setup.recomputes("mla_up_proj"):
            return count + self.up_projections()
        # The checkpoint keeps the rotary part of keys, a view of the product, and RoPE's angles.
        if shape.qk_layernorm and self.norm_upcasts:
            product = self.tokens * (latent.kv_lora_rank + latent.qk_pos_emb_head_dim)
            count += product * self.number_bytes
        return count + shape.seq_length * self.setup.rope_width * FP32

    def up_projections(self) -> int:
        """Queries, keys and values of multi-latent attention, with the factors of RoPE."""
        latent = self.shape.latent_attention
        assert latent is not None, "only multi-latent attention has up projections"
        heads = self.shape.num_attention_heads // self.layout.tp
        numbers = self.tokens * heads * (2 * latent.query_width + latent.v_head_dim)
        # The cosines and sines of RoPE, for queries and for keys.
        numbers += 4 * self.shape.seq_length * self.setup.rope_width
        return numbers * self.number_bytes

    def attention_scores(self) -> int:
        """The attention's `s²` scores of one layer."""
        setup, heads = self.setup, self.shape.num_attention_heads // self.layout.tp
        squares = setup.micro_batch_size * heads * self.shape.seq_length**2
        upcasts = setup.softmax_in_fp32 and self.number_bytes < FP32
        softmax_bytes = FP32 if upcasts else self.number_bytes
        per_score = softmax_bytes
        if upcasts or setup.attention_dropout:
            per_score += self.number_bytes  # the factor of the values is a separate tensor
        if setup.attention_dropout:
            per_score += self.mask_bytes
        # With a sink, the softmax returns one column more than is used.
        sinks = squares // self.shape.seq_length if self.shape.softmax_type != "vanilla" else 0
        return squares * per_score + sinks * softmax_bytes

    def mlp_norm_and_dropout(self) -> int:
        """The norm before and the dropout after a layer's MLP, dense or sparse."""
        return self.norm(self.own_tokens, self.shape.hidden_size) + self._hidden_mask()

    def mlp(self, cells: int) -> int:
        """A dense MLP without its norm and its input.

        Args:
            cells: width of the MLP on all tensor-parallel ranks together.
        """
        # Tensors `[tokens, cells]` that the activation function and the second matrix keep.
        tensors = {"relu": 1, "gelu": 2, "squared_relu": 2, "swiglu": 5, "quick_geglu": 6}[
            self.setup.activation
        ]
        tensors += self.setup.clamp  # the gates, clamped
        return tensors * self.tokens * cells // self.layout.tp * self.number_bytes

    def feed_forward(self, layer: str) -> float:
        """The feed-forward part of a layer, dense or sparse, with its norm.

        Args:
            layer: the layer's parts, such as `*E` (`layer_parts`).
        """
        setup, count = self.setup, self.mlp_norm_and_dropout()
        if Symbols.MOE not in layer:
            return count + self.hidden_states() + self.mlp(self.shape.ffn_hidden_size)
        sffn = self.shape.sffn_of_layer(layer)
        call = LayerCall(
            sffn=sffn,
            hidden_size=self.shape.hidden_size,
            tokens=self.own_tokens,
            layout=self.layout,
            activation=setup.activation,
            losses=setup.losses,
            clamp=setup.clamp,
            offset=setup.offset,
            cuda=setup.cuda,
        )
        return count + saved_by_sparse_layer(call) + self.mlp(sffn.shared_cells)

    def layer(self, parts: str) -> float:
        """All activations that one layer keeps.

        Args:
            parts: of the layer, such as `*E` (`layer_parts`).
        """
        counts, count = count_parts(parts), 0.0
        if counts.attentions:
            count += self.attention() + self.attention_scores()
        if counts.dense + counts.sparse:
            count += self.feed_forward(parts)
        return count

    def embedding(self) -> int:
        """The first stage's ids, positions (once for all sequences) and dropout mask."""
        positions = self.shape.seq_length * IDS if self.shape.learned_positions else 0
        return self.tokens * IDS + positions + self._hidden_mask()

    def head(self) -> int:
        """The last stage's final norm, logits (as probabilities in fp32) and targets.

        Each multi-token prediction has logits, too, and its loss with a mask and three sums.
        """
        norm = self.norm(self.own_tokens, self.shape.hidden_size)
        predictions = self.shape.predicted_tokens * (self._logits() + (2 * self.tokens + 3) * FP32)
        return norm + self._logits() + predictions

    def _logits(self) -> int:
        """The input of the logits, and what their loss keeps."""
        vocabulary = self.shape.padded_vocab_size // self.layout.tp
        return self.hidden_states() + self.tokens * (vocabulary * FP32 + IDS + 1)

    def prediction_input(self) -> int:
        """The token ids (and positions) of one multi-token prediction and its embedding's mask."""
        ids = 2 if self.shape.learned_positions else 1
        return ids * self.tokens * IDS + self._hidden_mask()

    def prediction_projection(self) -> int:
        """Three norms and the projection of one multi-token prediction, without its layers."""
        count = 3 * self.norm(self.own_tokens, self.shape.hidden_size) + 2 * self.hidden_states()
        if not self.norm_upcasts:
            # The first layer's norm keeps its input, a view of the projection of all tokens.
            other_tokens = self.tokens - self.own_tokens
            count += other_tokens * self.shape.hidden_size * self.number_bytes
        return count

    def _hidden_mask(self) -> int:
        """The mask of a dropout of hidden states, if there is one."""
        numbers = self.own_tokens * self.shape.hidden_size
        return numbers * self.mask_bytes if self.setup.hidden_dropout else 0
