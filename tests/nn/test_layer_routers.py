"""`--sffn-router` with several routers: which sparse layer has which."""

from __future__ import annotations

import pytest

from megatron_sffn.nn.config import SparseFFNConfig
from megatron_sffn.nn.layer_routers import canonical, other_routers, router_names
from megatron_sffn.nn.routers import ROUTERS
from megatron_sffn.utils.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "names", "layers"),
    [
        ("avg-k", ["avg-k"], {}),
        ("rand-hash:first:2,avg-k", ["avg-k", "rand-hash"], {0: "rand-hash", 1: "rand-hash"}),
        ("switch:last:1,pkm:0,avg-k", ["avg-k", "pkm", "switch"], {0: "pkm", 5: "switch"}),
        ("switch:every:3,avg-k", ["avg-k", "switch"], {2: "switch", 5: "switch"}),
        ("switch:1,switch:3,avg-k", ["avg-k", "switch"], {1: "switch", 3: "switch"}),
    ],
)
def test_every_part_of_the_text_has_its_layers(
    text: str, names: list[str], layers: dict[int, str]
) -> None:
    assert router_names(text) == names
    assert other_routers(text, 6) == layers


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("switch:first:7,avg-k", "switch:first:7 names sparse layer 6 of a model with 6 sparse"),
        ("switch:first:0,avg-k", "switch:first:0 names no layer"),
        ("switch:first:2,pkm:1,avg-k", "gives sparse layer 1 two routers; give it one"),
        ("switch:every:1,avg-k", "leaves none of the 6 sparse layers to avg-k; name fewer"),
        ("switch,avg-k", "does not say which layers switch has; write first:N, last:N"),
        ("switch:half,avg-k", "does not say which layers switch:half has"),
        ("switch:first:2,avg-k:last:4", "says layers of its last router, which has all"),
    ],
)
def test_texts_that_do_not_fit_the_layers_are_refused(text: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=f"^--sffn-router {text}") as refusal:
        other_routers(text, 6)
    assert sentence in str(refusal.value)


def test_the_remaining_layers_may_be_named_rest() -> None:
    assert canonical("rand-hash:first:3, avg-k:rest") == "rand-hash:first:3,avg-k"


def test_the_config_of_a_layer_has_its_router_alone() -> None:
    switch, avg_k = ROUTERS["switch"](), ROUTERS["avg-k"]()
    sffn = SparseFFNConfig(active_cells=256, router=avg_k, other_routers=((1, switch),))
    assert [sffn.of_layer(index).router for index in range(3)] == [avg_k, switch, avg_k]
    assert all(not sffn.of_layer(index).other_routers for index in range(3))
    assert sffn.layers_by_router(5) == [(sffn.of_layer(0), 4), (sffn.of_layer(1), 1)]


def test_every_router_has_to_be_defined_for_the_layer() -> None:
    with pytest.raises(ConfigError, match="--sffn-router pkm has a score for every cell"):
        SparseFFNConfig(
            active_cells=256, router=ROUTERS["avg-k"](), other_routers=((0, ROUTERS["pkm"]()),)
        )
