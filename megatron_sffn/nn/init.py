"""The initial values of all weights, in one table but for those of `recurrent_init.py`.

`INITIAL_VALUES` says how each weight is drawn, with what standard deviation, and which source says
so. `reinit.py` draws the dense weights from it, `block_weights.py` the keys and values. A router
draws its own weights in `Router.draw`; `tests/nn/test_init.py` compares them with the table. A
router weight that has no row is drawn by Megatron's `init_method`.

Design notes: every weight is drawn on the CPU, in fp32 or wider, from a generator seeded by the
weight's identity. A run therefore starts from the same model on every layout and every device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_sffn.nn.recurrent_init import recurrent_init
from megatron_sffn.nn.transformer_config import SparseFFNTransformerConfig, depth

InitMethod = Callable[..., Any]
"""Fills a tensor in place: `init_method(tensor)` or `init_method(tensor, generator=...)`."""

SOFTMAX_OFFSET = "softmax_offset"
"""End of the name of the attention sinks (`--softmax-type learnable`), the one vector that is drawn
at random."""


@dataclass(frozen=True)
class InitialValue:
    """The initial distribution of one kind of weight.

    Args:
        distribution: `normal` and `uniform` have mean zero; `zeros`; the others are methods of
            Megatron's config, which draw from a normal distribution.
        std: standard deviation, from the model's config and the size of the weight's last axis.
        source: the paper, or Megatron.
    """

    distribution: str
    std: Callable[[Any, int], float]
    source: str


def _row_width(config: SparseFFNTransformerConfig) -> int:
    """Width of the rows that blocks read and write."""
    assert config.sffn is not None, "block weights need config.sffn"
    return config.sffn.row_width(config.hidden_size)


def _all_queries(config: SparseFFNTransformerConfig) -> int:
    """Numbers of the queries of all heads."""
    assert config.sffn is not None, "block weights need config.sffn"
    shapes = config.sffn.router.weights(config.sffn, config.hidden_size)
    return shapes["query"][0]


# c is the model's config, n the size of the weight's last axis.
_MEGATRON = InitialValue("init_method", lambda c, n: c.init_method_std, "Megatron")
_MEGATRON_OUTPUT = InitialValue(
    "output_layer_init_method",
    lambda c, n: c.init_method_std / math.sqrt(2 * depth(c)),
    "Megatron",
)
_ZERO = ("zeros", lambda c, n: 0.0)
_LAMPLE = "Lample et al. 2019, arXiv 1907.05242"
_CSORDAS = "Csordás et al. 2023, arXiv 2310.10837"
_BERGES = "Berges et al. 2024, arXiv 2412.09764"
_WIDTH = InitialValue("normal", lambda c, n: n**-0.5, _BERGES)
# Std for a pre-norm layer whose output is one of `depth(c)` residual terms.
_PRE_NORM = InitialValue("normal", lambda c, n: math.sqrt(2 / (depth(c) * n)), _CSORDAS)

INITIAL_VALUES: dict[tuple[str, str], InitialValue] = {
    # Dense weights, attention and embeddings
    ("dense", "embedding"): InitialValue(
        "embedding_init_method", lambda c, n: c.embedding_init_method_std, "Megatron"
    ),
    ("dense", "output projection"): _MEGATRON_OUTPUT,
    ("dense", "other matrix"): _MEGATRON,
    ("dense", SOFTMAX_OFFSET): _MEGATRON,
    # Block weights, by `--sffn-init`
    ("megatron", "keys"): _MEGATRON,
    ("megatron", "values"): _MEGATRON_OUTPUT,
    ("sigma-moe", "keys"): InitialValue(
        "normal", lambda c, n: math.sqrt(2 / (depth(c) * _row_width(c))), _CSORDAS
    ),
    ("sigma-moe", "values"): InitialValue(
        "normal", lambda c, n: math.sqrt(2 / (depth(c) * c.sffn.num_cells)), _CSORDAS
    ),
    ("sigma-moe-block", "keys"): InitialValue(
        "normal", lambda c, n: math.sqrt(2 / (depth(c) * _row_width(c))), _CSORDAS
    ),
    ("sigma-moe-block", "values"): InitialValue(
        "normal",
        lambda c, n: math.sqrt(2 / (depth(c) * c.sffn.block_size)),
        f"{_CSORDAS}, ablation",
    ),
    ("pkm", "keys"): _MEGATRON,
    ("pkm", "values"): InitialValue("normal", lambda c, n: _row_width(c) ** -0.5, _LAMPLE),
    # The projections around the blocks of a latent layer
    ("latent", "down"): _MEGATRON,
    ("latent", "up"): _MEGATRON_OUTPUT,
    # Routers, by `--sffn-router`
    ("router avg-k", "descriptor.weight"): InitialValue(
        *_ZERO, "this project: all cells of a block have the same weight"
    ),
    ("router noisy-top-k", "weight"): InitialValue(*_ZERO, "Shazeer et al. 2017, arXiv 1701.06538"),
    ("router noisy-top-k", "noise_weight"): InitialValue(
        *_ZERO, "Shazeer et al. 2017, arXiv 1701.06538"
    ),
    # The rows of sigma-MoE's weight are then scaled to the same norm, at the same std over all.
    ("router sigma-moe", "weight"): _PRE_NORM,
    ("router sigma-moe", "hidden"): _PRE_NORM,
    ("router softmax-before", "weight"): _PRE_NORM,
    ("router softmax-before", "hidden"): _PRE_NORM,
    ("router softmax-after", "weight"): _PRE_NORM,
    ("router softmax-after", "hidden"): _PRE_NORM,
    ("router pkm", "query"): _MEGATRON,
    ("router pkm", "query_bias"): InitialValue(*_ZERO, _LAMPLE),
    ("router pkm", "subkeys"): InitialValue(
        "uniform", lambda c, n: 1 / math.sqrt(3 * n), f"{_LAMPLE}: between ±1/sqrt(n)"
    ),
    ("router peer", "query"): _MEGATRON,
    ("router peer", "query_bias"): InitialValue(*_ZERO, _LAMPLE),
    ("router peer", "subkeys"): InitialValue(
        "uniform", lambda c, n: 1 / math.sqrt(3 * n), f"{_LAMPLE}: between ±1/sqrt(n)"
    ),
    ("router pkm-ffn", "query"): _MEGATRON,
    ("router pkm-ffn", "subkeys"): _MEGATRON,
    ("router memory-plus", "query"): InitialValue(
        "uniform", lambda c, n: math.sqrt(2 / (n + _all_queries(c))), _BERGES
    ),
    ("router memory-plus", "query_bias"): InitialValue(*_ZERO, _LAMPLE),
    ("router memory-plus", "subkeys"): InitialValue(
        "uniform", lambda c, n: 1 / math.sqrt(3 * 2 * n), f"{_BERGES}: between ±1/sqrt(2n)"
    ),
    ("router memory-plus", "output_gate"): _WIDTH,
    ("router memory-plus", "output_projection"): _WIDTH,
    ("router pkm-relu", "query"): _PRE_NORM,
    ("router pkm-relu", "query_bias"): InitialValue(*_ZERO, _LAMPLE),
    # The fan-in of a sub-key is the whole key, of which it is one half.
    ("router pkm-relu", "subkeys"): InitialValue(
        "normal", lambda c, n: math.sqrt(2 / (depth(c) * 2 * n)), _CSORDAS
    ),
}
"""(kind or option, weight) -> how the weight is drawn."""


def block_weight_init(config: SparseFFNTransformerConfig) -> tuple[InitMethod, InitMethod]:
    """The init methods of keys and of values (`--sffn-init`)."""
    assert config.sffn is not None, "block weights need config.sffn"
    option = config.sffn.initialization or config.sffn.router.initialization
    draw_keys, draw_values = (
        _init_method(INITIAL_VALUES[option, weight], config) for weight in ("keys", "values")
    )
    return draw_keys, draw_values


def latent_init(name: str, config: SparseFFNTransformerConfig) -> InitMethod:
    """The init method of a latent layer's projection, `down` or `up`."""
    return _init_method(INITIAL_VALUES["latent", name], config)


def dense_weight_init(name: str, num_axes: int, config: TransformerConfig) -> InitMethod | None:
    """The init method of a dense weight; None if Megatron sets it to a constant.

    Args:
        name: name of the weight in a checkpoint.
        num_axes: number of axes of the weight.
        config: config of the model.
    """
    if (recurrent := recurrent_init(name)) is not None:
        return recurrent
    if name.endswith(SOFTMAX_OFFSET):
        weight = SOFTMAX_OFFSET
    elif num_axes < 2:
        return None  # biases and the weights of norms
    elif "embedding" in name:
        weight = "embedding"
    elif name.endswith(("linear_proj.weight", "linear_fc2.weight", ".out_proj.weight")):
        weight = "output projection"
    else:
        weight = "other matrix"
    return _init_method(INITIAL_VALUES["dense", weight], config)


def init_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which a weight is drawn before it is rounded to its own: fp32 or wider.

    Releases of torch draw different half-precision numbers from the same seed.
    """
    return torch.promote_types(weight.dtype, torch.float32)


def _init_method(row: InitialValue, config: TransformerConfig) -> InitMethod:
    if row.distribution == "normal":
        return partial(torch.nn.init.normal_, std=row.std(config, config.hidden_size))
    method: InitMethod = getattr(config, row.distribution)
    return method
