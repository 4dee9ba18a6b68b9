"""The table of initial values agrees with what layers and routers draw."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from megatron_sffn.nn.config import INITIALIZATIONS, SparseFFNConfig
from megatron_sffn.nn.init import INITIAL_VALUES, InitialValue, dense_weight_init
from megatron_sffn.nn.layer import SparseFFN
from megatron_sffn.nn.routers import ROUTERS
from megatron_sffn.nn.routers.base import Router
from megatron_sffn.nn.transformer_config import SparseFFNTransformerConfig

OPTIONS: dict[str, dict[str, Any]] = {
    "avg-k": {"descriptor": "learned", "gate": "sigmoid"},
    **{name: {"network": "mlp"} for name in ("sigma-moe", "softmax-before", "softmax-after")},
}
"""Options that give a router all weights of the table."""
ROUTER_ROWS = [
    (owner.removeprefix("router "), weight)
    for owner, weight in INITIAL_VALUES
    if owner.startswith("router ")
]


def sparse_layer(router: str) -> SparseFFN:
    """A layer of 1,024 cells and width 64."""
    single_cells = router == "top-k-act" or ROUTERS[router]().key_width(64) == 0
    config = SparseFFNTransformerConfig(
        num_layers=3,
        hidden_size=64,
        num_attention_heads=1,
        add_bias_linear=False,
        init_method_std=0.07,
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="none",
        sffn=SparseFFNConfig(
            active_cells=64,
            block_size=1 if single_cells else 4,
            expansion=16,
            router=ROUTERS[router](**OPTIONS.get(router, {})),
        ),
    )
    return SparseFFN(config, layer_number=2)


def assert_drawn(weight: torch.Tensor, row: InitialValue, config: Any) -> None:
    std = row.std(config, weight.shape[-1])
    # Four standard errors of the estimate; rows of equal norm vary less.
    assert weight.std().item() == pytest.approx(std, rel=4 / math.sqrt(2 * weight.numel()))
    assert abs(weight.mean().item()) <= 4 * std / math.sqrt(weight.numel())


def test_every_value_of_sffn_init_has_keys_and_values() -> None:
    rows = {(option, weight) for option in INITIALIZATIONS for weight in ("keys", "values")}
    assert rows <= set(INITIAL_VALUES)


@pytest.mark.parametrize(("router", "weight"), ROUTER_ROWS)
def test_a_router_draws_what_its_row_says(one_rank: None, router: str, weight: str) -> None:
    layer = sparse_layer(router)
    drawn = dict(layer.router.named_parameters())[weight].detach()
    assert_drawn(drawn, INITIAL_VALUES[f"router {router}", weight], layer.config)


@pytest.mark.parametrize("router", sorted(set(ROUTERS) - {"dense"}))
def test_weights_without_a_row_are_drawn_by_megatrons_init_method(
    one_rank: None, router: str
) -> None:
    layer = sparse_layer(router)
    if type(layer.router).draw is not Router.draw:
        return
    for _, weight in layer.router.named_parameters():
        assert_drawn(weight.detach(), INITIAL_VALUES["dense", "other matrix"], layer.config)


@pytest.mark.parametrize(
    ("name", "num_axes", "row"),
    [
        ("embedding.word_embeddings.weight", 2, "embedding"),
        ("decoder.layers.self_attention.linear_proj.weight", 2, "output projection"),
        ("decoder.layers.mlp.linear_fc2.weight", 2, "output projection"),
        ("decoder.layers.mlp.linear_fc1.weight", 2, "other matrix"),
        ("decoder.layers.self_attention.core_attention.softmax_offset", 1, "softmax_offset"),
        ("decoder.layers.mlp.linear_fc1.bias", 1, None),
    ],
)
def test_dense_weights_are_drawn_by_the_row_of_their_kind(
    one_rank: None, name: str, num_axes: int, row: str | None
) -> None:
    config = sparse_layer("avg-k").config
    config.embedding_init_method_std = 0.5
    config.embedding_init_method = lambda weight: torch.nn.init.normal_(weight, std=0.5)
    init_method = dense_weight_init(name, num_axes, config)
    if row is None:
        assert init_method is None
        return
    assert init_method is not None
    weight = torch.empty(200, 200)
    torch.manual_seed(0)
    init_method(weight)
    assert_drawn(weight, INITIAL_VALUES["dense", row], config)


RECURRENT = {
    "mixer.A_log": (4096,),
    "mixer.dt_bias": (4096,),
    "mixer.conv1d.weight.x": (1024, 1, 4),
    "mixer.conv1d.bias.B": (4096,),
    "self_attention.A_log": (4096,),
    "self_attention.conv1d.weight.key": (1024, 1, 4),
}
"""Weight of a Mamba layer or a gated delta net -> a shape."""


def megatrons_draw(name: str, size: int) -> torch.Tensor:
    """The weight as the formulas of Megatron's modules draw it."""
    if name.endswith("A_log"):
        return torch.empty(size).uniform_(1, 16).log()
    if name.endswith("dt_bias"):
        low, high = math.log(0.001), math.log(0.1)
        step = torch.exp(torch.rand(size) * (high - low) + low).clamp(min=1e-4)
        return step + torch.log(-torch.expm1(-step))
    return torch.empty(size).uniform_(-0.5, 0.5)


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers_start_with_megatrons_distribution(name: str) -> None:
    torch.manual_seed(1)
    weight = torch.empty(RECURRENT[name])
    init_method = dense_weight_init(
        f"decoder.layers.{name}", weight.ndim, sparse_layer("switch").config
    )
    assert init_method is not None
    init_method(weight)
    quantiles = torch.linspace(0.01, 0.99, 25)
    actual, expected = (
        tensor.flatten().quantile(quantiles) for tensor in (weight, megatrons_draw(name, 40_000))
    )
    spread = expected[-1] - expected[0]
    assert float((actual - expected).abs().max() / spread) < 0.04
    # Other vectors are constants, which Megatron has set.
    assert dense_weight_init("decoder.layers.mixer.D", 1, sparse_layer("switch").config) is None
