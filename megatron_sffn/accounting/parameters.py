"""Parameters of a model, total and active, and of its parts.

Inputs: a `ModelShape`. Outputs: exactly the counts of Megatron's model of this shape.

Design notes: M is E·k cells whatever the shared blocks are. Shared blocks are further cells, with
keys of D numbers also where the keys of the M cells are narrower.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sffn.accounting.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Parameters: `total`, and `active` with K blocks of each sparse layer."""

    total: int
    active: int


def count_parameters(shape: ModelShape) -> Parameters:
    """Parameters of Megatron's GPT or hybrid model of this shape."""
    width = shape.hidden_size
    rest = embedding_parameters(shape) + norm_parameters(shape, width)
    if not shape.tied_embeddings:
        rest += output_parameters(shape)
    predictions = shape.own_predictions
    counts = shape.layers_with(predictions)
    # Each attention, each recurrent layer and each feed-forward part has a norm before it.
    rest += counts.attentions * attention_parameters(shape)
    rest += counts.parts * norm_parameters(shape, width)
    rest += counts.dense * mlp_parameters(shape) + predictions * prediction_parameters(shape)
    rest += counts.mambas * shape.mamba.parameters(width)
    head_norm = norm_parameters(shape, shape.delta_net.linear_value_head_dim)
    rest += counts.delta_nets * shape.delta_net.parameters(width, head_norm)
    total = active = rest
    cells = chosen = 0
    for layer, sffn, count in shape.by_router(predictions):
        router = sffn.router.parameters(sffn, layer.router_width)
        every_token = router + shared_parameters(layer) + layer.latent_projections
        total += count * every_token
        active += count * every_token
        cells += count * layer.sparse_cell * sffn.num_cells
        chosen += count * layer.sparse_cell * sffn.chosen_cells
    if counts.sparse:
        # Layers with one table choose different blocks of it.
        cells = cells * shape.tables(counts.sparse, predictions) // counts.sparse
    return Parameters(total=total + cells, active=active + min(chosen, cells))


def embedding_parameters(shape: ModelShape) -> int:
    """Parameters of the token embedding, and of learned position embeddings."""
    return (shape.padded_vocab_size + shape.learned_positions) * shape.hidden_size


def output_parameters(shape: ModelShape) -> int:
    """Parameters of the output layer, if it does not share the embedding's weights."""
    return shape.padded_vocab_size * shape.hidden_size


def norm_parameters(shape: ModelShape, width: int) -> int:
    """Parameters of one normalisation."""
    return (2 if shape.layernorm else 1) * width


def attention_parameters(shape: ModelShape) -> int:
    """Parameters of one attention: projections, biases, and norms of queries and keys."""
    count = attention_matrices(shape)
    if (latent := shape.latent_attention) is not None:
        count += (shape.hidden_size if shape.bias else 0) + shape.sinks
        norms = (latent.q_lora_rank, latent.kv_lora_rank) if shape.qk_layernorm else ()
        return count + sum(norm_parameters(shape, width) for width in norms if width is not None)
    count += shape.projected_width if shape.bias or shape.qkv_bias else 0
    count += shape.hidden_size if shape.bias else 0
    count += 2 * norm_parameters(shape, shape.kv_channels) if shape.qk_layernorm else 0
    count += shape.sinks
    return count


def attention_matrices(shape: ModelShape) -> int:
    """Parameters of the projections of one attention."""
    if (latent := shape.latent_attention) is not None:
        return latent.matrices(shape.hidden_size, shape.num_attention_heads)
    return (shape.projected_width + shape.query_width) * shape.hidden_size


def prediction_parameters(shape: ModelShape) -> int:
    """Parameters of one multi-token prediction without its layers: three norms, and a projection.

    The input of the projection is the hidden state and the embedding of the next token, joined.
    """
    width = shape.hidden_size
    return 3 * norm_parameters(shape, width) + 2 * width * width


def mlp_parameters(shape: ModelShape) -> int:
    """Parameters of one dense MLP."""
    cells = shape.ffn_hidden_size
    biases = shape.keys_per_cell * cells + shape.hidden_size
    return shape.dense_cell * cells + (biases if shape.bias else 0)


def shared_parameters(shape: ModelShape) -> int:
    """Parameters of the shared blocks of one sparse layer, which have no biases."""
    return shape.dense_cell * shape.sffn.shared_cells if shape.sffn is not None else 0
