"""PEER: product keys over blocks with keys, and blocks that several heads choose."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_sffn.nn.layer import SparseFFN
from megatron_sffn.nn.routers.base import Routing
from megatron_sffn.nn.routers.gates import gates_of_chosen
from megatron_sffn.nn.routers.peer import PeerConfig, one_slot_per_block
from megatron_sffn.utils.errors import ConfigError
from tests.nn.routers.conftest import D, T, transformer

HEADS, HALF = 4, 3
NUMBERS = {"active_cells": 16, "block_size": 2, "expansion": 2}  # B = 16 blocks, K = 8
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def layer_of(numbers: dict[str, int], **options: Any) -> tuple[SparseFFN, Tensor]:
    """A layer with large weights in its router, and tokens `[T, D]`."""
    config = PeerConfig(**{"heads": HEADS, "key_size": 2 * HALF, **options})
    layer = SparseFFN(transformer(config, **numbers), layer_number=1)
    torch.manual_seed(5)
    with torch.no_grad():
        for weight in layer.router.parameters():
            weight.normal_()
    return layer, torch.randn(T, D).double()


def head_by_head(layer: SparseFFN, x: Tensor, gate: str) -> tuple[Tensor, Tensor]:
    """Outputs `[T, D]`, summed one head and block after the other, and `[T, heads, knn]` ids."""
    router, (keys, values) = layer.router, layer.experts()
    heads, _, side, _ = router.subkeys.shape
    per_head = router.sffn.num_active_blocks // heads
    queries = F.linear(x, router.query, router.query_bias).view(len(x), heads, 2, HALF)
    halves = torch.einsum("thpc,hpnc->thpn", queries, router.subkeys)
    sums = halves[:, :, 0, :, None] + halves[:, :, 1, None, :]
    scores, ids = sums.flatten(2).topk(per_head, dim=2)
    gates, rows = gates_of_chosen(gate, scores), []
    for t in range(len(x)):
        row = x.new_zeros(D)
        for head, place in itertools.product(range(heads), range(per_head)):
            block = ids[t, head, place]
            row = row + gates[t, head, place] * (F.gelu(x[t] @ keys[block].T) @ values[block])
        rows.append(row)
    assert side**2 == router.sffn.num_blocks
    return torch.stack(rows), ids


@pytest.mark.parametrize("gate", ["softmax-chosen", "sigmoid", "sqrt-softplus-chosen"])
@pytest.mark.parametrize("numbers", [NUMBERS, NUMBERS | {"block_size": 1, "expansion": 4}])
def test_the_layer_sums_what_its_heads_compute_one_by_one(
    one_rank: None, numbers: dict[str, int], gate: str
) -> None:
    layer, x = layer_of(numbers, gate=gate)
    weights, leaves = torch.randn(T, D).double(), [*layer.parameters()]
    y, _ = layer(x[:, None])
    expected, ids = head_by_head(layer, x, gate)
    assert any(len(set(row)) < len(row) for row in ids.flatten(1).tolist()), "heads share blocks"
    torch.testing.assert_close(y[:, 0], expected, **CLOSE)
    actual_grads = torch.autograd.grad((y[:, 0] * weights).sum(), leaves)
    expected_grads = torch.autograd.grad((expected * weights).sum(), leaves)
    for actual, wanted in zip(actual_grads, expected_grads, strict=True):
        torch.testing.assert_close(actual, wanted, **CLOSE)


def test_a_row_has_distinct_blocks_whose_gates_add_up_to_the_number_of_heads(
    one_rank: None,
) -> None:
    layer, x = layer_of(NUMBERS)
    routing = layer.router(x, layer.experts.keys)
    _, ids = head_by_head(layer, x, "softmax-chosen")
    for row, by_head in zip(routing.block_ids.tolist(), ids.flatten(1).tolist(), strict=True):
        blocks = [block for block in row if block >= 0]
        assert blocks == sorted(set(by_head))
        assert row[len(blocks) :] == [-1] * (len(row) - len(blocks))
    torch.testing.assert_close(routing.gates.sum(dim=1), torch.full((T,), HEADS).double(), **CLOSE)
    assert routing.may_be_empty and (routing.gates[routing.block_ids < 0] == 0).all()


def test_a_block_that_two_heads_chose_has_one_slot_the_sum_and_the_larger_score() -> None:
    routing = one_slot_per_block(
        Routing(
            block_ids=torch.tensor([[7, 3, 3, 9], [0, 1, 2, 3]]),
            gates=torch.tensor([[0.25, 0.75, 0.5, 0.5], [1.0, 2.0, 3.0, 4.0]]),
            scores=torch.tensor([[1.0, -2.0, -1.0, 4.0], [5.0, 6.0, 7.0, 8.0]]),
        )
    )
    assert routing.block_ids.tolist() == [[3, 7, 9, -1], [0, 1, 2, 3]]
    assert routing.gates is not None and routing.scores is not None
    assert routing.gates.tolist() == [[1.25, 0.25, 0.5, 0.0], [1.0, 2.0, 3.0, 4.0]]
    assert routing.scores.tolist() == [[-1.0, 1.0, 4.0, 0.0], [5.0, 6.0, 7.0, 8.0]]


def test_one_head_leaves_no_slot_empty(one_rank: None) -> None:
    layer, x = layer_of(NUMBERS, heads=1)
    routing = layer.router(x, layer.experts.keys)
    assert not routing.may_be_empty and routing.block_ids.min() >= 0


@pytest.mark.parametrize(
    ("options", "numbers", "sentence"),
    [
        (
            {},
            {"expansion": 3},
            r"a square number of blocks, not 24 .* / --sffn-block-size 2\); .* 8",
        ),
        ({"heads": 3}, {}, "--sffn-pkm-heads 3 does not divide the 8 active blocks"),
        ({"heads": 8}, {}, "each of --sffn-pkm-heads 8 heads chooses one block"),
        ({"gate": "softmax"}, {}, "--sffn-gate softmax needs the scores of all blocks"),
        ({"gate": "none"}, {}, "with --sffn-gate none no gradient passes through the choice"),
        ({"key_size": 5}, {}, "use 4 or 6"),
    ],
)
def test_undefined_settings_are_refused(
    options: dict[str, Any], numbers: dict[str, int], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        transformer(PeerConfig(**{"heads": HEADS, **options}), **NUMBERS | numbers)


def test_heads_that_choose_one_block_each_can_have_a_sigmoid(one_rank: None) -> None:
    layer, x = layer_of(NUMBERS, heads=8, gate="sigmoid")
    layer.router(x, layer.experts.keys).gates.sum().backward()
    assert layer.router.subkeys.grad.abs().sum() > 0
