"""Parameters of a model, total and active, and of its parts as they are cut over ranks.

Enters: a `ModelShape`. Leaves: the counts that a built GPT of Megatron's has, exactly.

Choice: the memory is E·k cells whatever the shared blocks are; those are cells of their own beside
it, with keys of D numbers also where the memory's are narrower.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sffn.accounting.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Parameters: `total`, and `active` with K instead of B blocks in each sparse layer."""

    total: int
    active: int


def count_parameters(shape: ModelShape) -> Parameters:
    """Parameters of Megatron's GPT of this shape."""
    width, sffn = shape.hidden_size, shape.sffn
    rest = embedding_parameters(shape) + norm_parameters(shape, width)
    if not shape.tied_embeddings:
        rest += output_parameters(shape)
    rest += shape.num_layers * (attention_parameters(shape) + 2 * norm_parameters(shape, width))
    rest += (shape.num_layers - shape.sparse_layers) * mlp_parameters(shape)
    rest += shape.predicted_tokens * prediction_parameters(shape)
    if sffn is None:
        return Parameters(total=rest, active=rest)
    rest += shape.sparse_layers * (sffn.router.parameters(sffn, width) + shared_parameters(shape))
    per_cell = shape.sparse_layers * shape.memory_cell
    return Parameters(
        total=rest + per_cell * sffn.num_cells, active=rest + per_cell * sffn.chosen_cells
    )


def embedding_parameters(shape: ModelShape) -> int:
    """Of the tokens, and of the positions if they are learned."""
    return (shape.padded_vocab_size + shape.learned_positions) * shape.hidden_size


def output_parameters(shape: ModelShape) -> int:
    """Of the logits, if they have weights of their own."""
    return shape.padded_vocab_size * shape.hidden_size


def norm_parameters(shape: ModelShape, width: int) -> int:
    """Of one normalisation."""
    return (2 if shape.layernorm else 1) * width


def attention_parameters(shape: ModelShape) -> int:
    """Of one layer: both projections, their biases, the norms of queries and keys."""
    projected = shape.projected_width
    count = (projected + shape.query_width) * shape.hidden_size
    count += projected if shape.bias or shape.qkv_bias else 0
    count += shape.hidden_size if shape.bias else 0
    count += 2 * norm_parameters(shape, shape.kv_channels) if shape.qk_layernorm else 0
    count += shape.sinks
    return count


def prediction_parameters(shape: ModelShape) -> int:
    """Of one layer of multi-token prediction: a dense layer, three norms, and a projection.

    The projection joins the hidden state with the embedding of the token that is next.
    """
    width = shape.hidden_size
    layer = attention_parameters(shape) + mlp_parameters(shape) + 2 * norm_parameters(shape, width)
    return layer + 3 * norm_parameters(shape, width) + 2 * width * width


def mlp_parameters(shape: ModelShape) -> int:
    """Of one dense MLP."""
    cells = shape.ffn_hidden_size
    biases = shape.keys_per_cell * cells + shape.hidden_size
    return shape.dense_cell * cells + (biases if shape.bias else 0)


def shared_parameters(shape: ModelShape) -> int:
    """Of the shared blocks of one sparse layer, which have no biases."""
    return shape.dense_cell * shape.sffn.shared_cells if shape.sffn is not None else 0
