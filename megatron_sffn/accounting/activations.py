"""Bytes that the layers keep for the backward of one microbatch on one rank.

Enters: the model's shape, the layout and the setup. Leaves: bytes, by part of the model. After
Korthikanti et al. 2022 (arXiv 2205.05198), but for the modules that run here: Megatron's local
ones, unfused, whose attention keeps its `s²` scores.

Choices
- Counted is what torch's autograd saves, each storage once; what exists only while a kernel runs,
  buffers of collectives and the allocator's waste are not.
- A tensor belongs to who saves it first: a residual stream to the norm that reads it, a norm's
  output to the matrices behind it.
"""

from __future__ import annotations

from megatron_sffn.accounting.shape import ModelShape
from megatron_sffn.accounting.sparse import saved_by_sparse_layer
from megatron_sffn.accounting.training_setup import TrainingSetup
from megatron_sffn.nn.parallel_layout import ParallelLayout
from megatron_sffn.nn.saved_bytes import FP32, LayerCall

IDS = 8
"""Token ids, targets and indices are int64."""


class Activations:
    """Activations of the parts of a model, in bytes of a microbatch and rank.

    Args:
        shape: of the model.
        layout: of the ranks.
        setup: of the training.
    """

    def __init__(self, shape: ModelShape, layout: ParallelLayout, setup: TrainingSetup) -> None:
        self.shape, self.layout, self.setup = shape, layout, setup
        self.tokens = setup.micro_batch_size * shape.seq_length
        self.own_tokens = self.tokens // (layout.tp if layout.sequence_parallel else 1)
        """Tokens outside of the matrices."""
        self.numbers = layout.bytes_per_number
        self.raising_norm = not (shape.layernorm or setup.cuda) and layout.half_precision
        """Whether a norm keeps an fp32 copy of its input."""
        self.mask = 1 if setup.cuda else layout.bytes_per_number
        """A number of a dropout mask: the CPU has no narrower one."""

    def stream(self) -> int:
        """One tensor `[s, b, D]` outside of the matrices."""
        return self.own_tokens * self.shape.hidden_size * self.numbers

    def norm(self, rows: int, width: int, *, kept: bool = False) -> int:
        """A normalisation, without its output.

        Args:
            rows: vectors.
            width: of one.
            kept: whether the input is kept anyway.
        """
        vector = width * self.numbers
        if self.shape.layernorm:
            return rows * (
                (0 if kept else vector) + 2 * (FP32 if self.setup.cuda else self.numbers)
            )
        if self.setup.cuda:
            return rows * ((0 if kept else vector) + FP32)
        # On the CPU torch's RMSNorm is a product of simpler functions, in fp32.
        kept = kept and not self.raising_norm
        return rows * ((0 if kept else width * FP32) + width * FP32 + FP32)

    def attention(self) -> int:
        """The attention of one layer with its norm, without its scores."""
        shape, tensor = self.shape, self.layout.tp
        heads = shape.num_attention_heads // tensor
        groups = (shape.num_query_groups or shape.num_attention_heads) // tensor
        head = shape.kv_channels
        queries = self.tokens * heads * head * self.numbers
        gates = heads if shape.output_gate else 0
        mixed = self.tokens * (heads + gates + 2 * groups) * head * self.numbers
        count = self.norm(self.own_tokens, shape.hidden_size) + self.stream()
        moved, repeated = self.setup.rope_width > 0 or shape.qk_layernorm, groups < heads
        # Queries, keys and values are views of one product, unless they are moved or repeated.
        own = (moved or repeated, moved or repeated, repeated)
        count += sum(own) * queries
        if not repeated or (shape.qk_layernorm and not self.raising_norm):
            count += mixed
        if shape.qk_layernorm:
            count += self.norm(self.tokens * heads, head, kept=not repeated or groups == 1)
            count += self.norm(self.tokens * groups, head, kept=True)
        count += 4 * shape.seq_length * self.setup.rope_width * self.numbers
        # A gate keeps what it multiplies: the answers, and its sigmoid, which is always in fp32.
        count += self.tokens * gates * head * (self.numbers + FP32)
        return count + queries + self._hidden_mask()

    def scores(self) -> int:
        """The attention's `s²` scores of one layer."""
        setup, heads = self.setup, self.shape.num_attention_heads // self.layout.tp
        squares = setup.micro_batch_size * heads * self.shape.seq_length**2
        raised = setup.softmax_in_fp32 and self.numbers < FP32
        each = FP32 if raised else self.numbers
        if raised or setup.attention_dropout:
            each += self.numbers
        if setup.attention_dropout:
            each += self.mask
        # The softmax returns a column more than is used.
        sinks = squares // self.shape.seq_length if self.shape.softmax_type != "vanilla" else 0
        return squares * each + sinks * (FP32 if raised else self.numbers)

    def before_mlp(self) -> int:
        """The norm and the dropout around a layer's MLP, dense or sparse."""
        return self.norm(self.own_tokens, self.shape.hidden_size) + self._hidden_mask()

    def mlp(self, cells: int) -> int:
        """An MLP without its norm and its input.

        Args:
            cells: of all tensor-parallel ranks.
        """
        numbers = {"relu": 1, "gelu": 2, "squared_relu": 2, "swiglu": 5}[self.setup.activation]
        return numbers * self.tokens * cells // self.layout.tp * self.numbers

    def layer(self, sparse: bool) -> float:
        """Everything that one layer keeps."""
        shape, setup = self.shape, self.setup
        count = self.attention() + self.scores() + self.before_mlp()
        if not sparse:
            return count + self.stream() + self.mlp(shape.ffn_hidden_size)
        assert shape.sffn is not None, "a dense model has no sparse layer"
        call = LayerCall(
            sffn=shape.sffn,
            hidden_size=shape.hidden_size,
            tokens=self.own_tokens,
            layout=self.layout,
            activation=setup.activation,
            losses=setup.losses,
            cuda=setup.cuda,
        )
        return count + saved_by_sparse_layer(call) + self.mlp(shape.sffn.shared_cells)

    def embedding(self) -> int:
        """Of the first stage: the ids (and positions, once for all sequences) and the dropout."""
        positions = self.shape.seq_length * IDS if self.shape.learned_positions else 0
        return self.tokens * IDS + positions + self._hidden_mask()

    def head(self) -> int:
        """Of the last stage: the final norm, the logits as probabilities in fp32, the targets."""
        vocabulary = self.shape.padded_vocab_size // self.layout.tp
        loss = self.tokens * (vocabulary * FP32 + IDS + 1)
        return self.norm(self.own_tokens, self.shape.hidden_size) + self.stream() + loss

    def _hidden_mask(self) -> int:
        numbers = self.own_tokens * self.shape.hidden_size
        return numbers * self.mask if self.setup.hidden_dropout else 0
