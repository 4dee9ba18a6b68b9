"""One table for several layers: the same formula, gradients added up, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from torch import Tensor

from megatron_sffn.nn.layer import SparseFFN
from megatron_sffn.nn.routers import ROUTERS
from megatron_sffn.nn.shared_tables import SharedTables, cut_group
from megatron_sffn.utils.errors import ConfigError
from tests.support.router_cases import Case, config_of, inputs

CASES = {
    "memory-plus": Case(router="memory-plus"),
    "peer": Case(router="peer", swiglu=True),
    "avg-k": Case(router="avg-k", options=(("gate", "sigmoid"),)),
}


def run(layers: list[SparseFFN]) -> tuple[Tensor, Tensor]:
    """The hidden states behind the layers, and the gradient of those before them."""
    x, _, weights = inputs()
    x.requires_grad_()
    y = x
    for layer in layers:
        y = y + layer(y)[0]
    (y * weights).sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.parametrize("name", CASES)
def test_layers_with_one_table_are_layers_with_equal_tables_whose_gradients_add_up(
    name: str, one_rank: None
) -> None:
    config, tables = config_of(CASES[name]), SharedTables()
    shared = [SparseFFN(config, number, tables=tables) for number in (1, 2)]
    alone = [SparseFFN(config, number) for number in (1, 2)]
    with torch.no_grad():
        for own, first in zip(alone[1].experts(), alone[0].experts(), strict=True):
            assert own is None or not torch.equal(own, first)
            assert own is None or own.copy_(first) is own
    expected, actual = run(alone), run(shared)
    for result, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(result, wanted, rtol=1e-12, atol=1e-14)
    owners = [dict(layer.experts.named_parameters()) for layer in (shared[0], *alone)]
    assert [*owners[0]] == [*owners[1]]
    for table, *parts in zip(*(owner.values() for owner in owners), strict=True):
        summed = sum(part.grad for part in parts)
        torch.testing.assert_close(table.grad, summed, rtol=1e-12, atol=1e-14)
        assert all(part.grad.abs().max() > 1e-6 for part in parts)
    for one, other in zip(shared, alone, strict=True):
        for (weight_name, weight), (_, own) in zip(
            one.router.named_parameters(), other.router.named_parameters(), strict=True
        ):
            torch.testing.assert_close(
                weight.grad, own.grad, rtol=1e-12, atol=1e-14, msg=weight_name
            )


def test_the_first_layer_alone_has_the_table_in_parameters_and_checkpoints(one_rank: None) -> None:
    config, tables = config_of(CASES["avg-k"]), SharedTables()
    model = torch.nn.ModuleList([SparseFFN(config, n, tables=tables) for n in (1, 2)])
    assert {name for name, _ in model.named_parameters()} == {"0.experts.keys", "0.experts.values"}
    saved: list[dict[str, Any]] = [layer.sharded_state_dict() for layer in model]
    factories = [
        {key for key, entry in entries.items() if isinstance(entry, ShardedTensorFactory)}
        for entries in saved
    ]
    assert factories == [{"experts.keys", "experts.values"}, set()]


@pytest.mark.parametrize(
    ("sparse", "chunks", "layers_per_table", "group"),
    [
        ([1, 1, 1, 1], [2, 2], 2, None),
        ([1, 1, 1, 1], [2, 2], 4, [0, 1, 2, 3]),
        ([0, 1, 0, 1], [4], 2, None),
        ([0, 1, 0, 1], [2, 2], 2, [1, 3]),
        ([1, 1, 0, 0, 1, 1], [3, 3], 2, None),
        ([1, 1, 0, 1, 1, 1, 1, 1], [2, 2, 2, 2], 2, [3, 4]),
    ],
)
def test_a_group_is_cut_if_a_chunk_ends_between_its_layers(
    sparse: list[int], chunks: list[int], layers_per_table: int, group: list[int] | None
) -> None:
    assert cut_group(sparse, chunks, layers_per_table) == group


@pytest.mark.parametrize(
    ("fields", "megatron", "sentence"),
    [
        ({"layers_per_table": 0}, {}, "--sffn-layers-per-table 0 must be at least 1"),
        (
            {"layers_per_table": 2},
            {"moe_layer_freq": [1, 0]},
            "--sffn-layers-per-table 2 does not divide the 1 sparse layers",
        ),
        (
            {"layers_per_table": 2, "other_routers": ((0, ROUTERS["rand-hash"]()),)},
            {},
            "is for layers with the same router, .* choose one of avg-k, rand-hash for all layers",
        ),
    ],
)
def test_groups_that_no_layers_fill_are_refused(
    fields: dict[str, Any], megatron: dict[str, Any], sentence: str, one_rank: None
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        config_of(
            Case(router="avg-k", sffn=tuple(fields.items()), megatron=tuple(megatron.items()))
        )
