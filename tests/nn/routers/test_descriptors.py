"""Block descriptors agree with their formulas, and are the same vectors on every rank."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_sffn.nn.config import SparseFFNConfig
from megatron_sffn.nn.routers.avg_k import AvgKConfig, AvgKRouter
from megatron_sffn.nn.routers.descriptors import DESCRIPTORS
from megatron_sffn.ops import route_topk
from megatron_sffn.utils.errors import ConfigError
from megatron_sffn.utils.hashing import hashed_subsets, seed_of
from tests.nn.routers.conftest import tables, transformer
from tests.support import router_cases
from tests.support.ranks import run_ranks
from tests.support.router_cases import BATCH, Case, D, S

CLOSE = {"rtol": 1e-10, "atol": 1e-12}
BLOCKS, G = 12, 4
"""Sizes of the layers of `router_cases`."""


def subset_of(block: int, cells: int) -> list[int]:
    """The cells of a block of layer 1 that the descriptor `subset` averages."""
    key = seed_of(1234, 1, "subset")
    return hashed_subsets(torch.tensor([block]), size=G, count=cells, key=key)[0].tolist()


def by_hand(kind: str, keys: Tensor, cells: int = 1) -> Tensor:
    """`[B, G, D]` keys to `[B, D]`, one block at a time."""
    rows = []
    for index, block in enumerate(keys.unbind()):
        lengths = block.square().sum(dim=1).sqrt()
        match kind:
            case "mean" | "learned" | "ema":  # as they start
                rows.append(sum(block) / len(block))
            case "max-norm":
                rows.append(block[int(lengths.argmax())])
            case "norm-weighted":
                rows.append((block * lengths[:, None]).sum(dim=0) / lengths.sum())
            case "subset":
                rows.append(block[subset_of(index, cells)].mean(dim=0))
    return torch.stack(rows)


def descriptors_of_rank(
    kind: str, swiglu: bool, options: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's descriptors, the blocks that its tokens choose, and its gate keys."""
    torch.manual_seed(0)
    case = Case(
        router="avg-k",
        swiglu=swiglu,
        options=(("descriptor", kind), ("gate", "sigmoid"), *options.items()),
    )
    layer = router_cases.build(case)
    with torch.no_grad():
        for weight in layer.router.parameters():
            weight.zero_()  # their initial value
    grid = layer.experts.expert_grid
    keys = layer.experts.keys[:, : grid.num_local_cells]
    vectors = layer.router.descriptor(keys, 1)
    x = router_cases.draw(8, 30, D)
    return vectors.detach(), layer.router(x, layer.experts.keys).block_ids, keys.detach()


KINDS = [*((kind, {}) for kind in DESCRIPTORS), ("subset", {"subset_cells": 3})]
LAYOUTS = [(2, 2, 1), (2, 1, 2), (4, 2, 2)]


def all_descriptors() -> list[tuple[Tensor, Tensor, Tensor]]:
    """`descriptors_of_rank` of every kind, then again with SwiGLU."""
    return [
        descriptors_of_rank(*kind[:1], swiglu, kind[1])
        for swiglu in (False, True)
        for kind in KINDS
    ]


@cache
def descriptors_on(
    ranks: int, expert: int, cells: int
) -> list[list[tuple[Tensor, Tensor, Tensor]]]:
    """`all_descriptors` of every rank of a layout."""
    groups = {"expert_model_parallel_size": expert, "expert_tensor_parallel_size": cells}
    return run_ranks(ranks, all_descriptors, **groups)


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("number", range(len(KINDS)), ids=[kind for kind, _ in KINDS])
def test_a_descriptor_is_its_formula_on_every_rank(number: int, swiglu: bool) -> None:
    kind, options = KINDS[number]
    number += swiglu * len(KINDS)
    ((one_rank_vectors, chosen, keys),) = (rank[number] for rank in descriptors_on(1, 1, 1))
    assert keys.shape == (BLOCKS, G, D)
    expected = by_hand(kind, keys, options.get("subset_cells", 1))
    torch.testing.assert_close(one_rank_vectors, expected, **CLOSE)
    assert torch.equal(chosen, route_topk(router_cases.draw(8, 30, D) @ expected.T, 4))
    for layout in LAYOUTS:
        first, *other_ranks = (rank[number] for rank in descriptors_on(*layout))
        torch.testing.assert_close(first[0], one_rank_vectors, **CLOSE)
        assert torch.equal(first[1], chosen)
        for vectors, ids, _ in other_ranks:
            assert torch.equal(vectors, first[0]), "not the same bits everywhere"
            assert torch.equal(ids, chosen)


def test_different_descriptors_give_different_vectors() -> None:
    keys = router_cases.draw(1, BLOCKS, G, D)
    for kind in ("max-norm", "norm-weighted", "subset"):
        assert not torch.allclose(by_hand(kind, keys), by_hand("mean", keys))


GATED = [
    Case(router="avg-k", options=(("descriptor", kind), ("gate", gate)))
    for kind in ("mean", "max-norm", "norm-weighted", "learned", "subset")
    for gate in ("sigmoid", "softmax")
]


def run_all(cases: list[Case]) -> list[dict[str, Tensor]]:
    """Several cases, one after the other."""
    return [router_cases.run(case) for case in cases]


def test_the_gradient_of_a_gate_reaches_the_keys_and_the_weights_of_all_ranks() -> None:
    (one_rank_results,) = run_ranks(1, run_all, GATED)
    groups = {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 2}
    for results in run_ranks(4, run_all, GATED, **groups):
        for case, result, expected in zip(GATED, results, one_rank_results, strict=True):
            assert result.keys() == expected.keys()
            for name, expected_value in expected.items():
                torch.testing.assert_close(
                    result[name], expected_value, rtol=1e-9, atol=1e-11, msg=f"{case}: {name}"
                )
            if case.options[0][1] == "learned":
                assert expected["drouter.descriptor.weight"].abs().min() > 0


def test_learned_weights_are_a_softmax_of_a_number_per_cell(build: Callable[..., Any]) -> None:
    x, keys, _ = tables()
    config = AvgKConfig(descriptor="learned", gate="sigmoid")
    router = build(config)
    weight = router.descriptor.weight
    assert weight.shape == (12, 2) and (weight == 0).all()
    assert sum(w.numel() for w in router.parameters()) == config.parameters(router.sffn, 6) == 24
    with torch.no_grad():
        weight.copy_(torch.randn(12, 2))
    shares = weight.exp() / weight.exp().sum(dim=1, keepdim=True)
    scores = x @ (shares[:, :, None] * keys).sum(dim=1).T
    routing = router(x, keys)
    expected = scores.sigmoid().gather(1, routing.block_ids)
    torch.testing.assert_close(routing.gates, expected, **CLOSE)
    (actual,) = torch.autograd.grad(routing.gates.square().sum(), weight)
    (formula,) = torch.autograd.grad(expected.square().sum(), weight)
    torch.testing.assert_close(actual, formula, **CLOSE)
    assert actual.abs().sum() > 0


def test_the_first_of_equally_long_keys_is_the_longest(build: Callable[..., Any]) -> None:
    router = build(AvgKConfig(descriptor="max-norm"), block_size=4)
    keys = torch.eye(6).double()[:4].expand(6, 4, 6)
    expected = torch.eye(6).double()[:1].expand(6, 6)
    assert torch.equal(router.descriptor(keys, 1), expected)


def test_keys_of_zero_have_a_descriptor_of_zero(build: Callable[..., Any]) -> None:
    router = build(AvgKConfig(descriptor="norm-weighted"))
    assert (router.descriptor(torch.zeros(12, 2, 6).double(), 1) == 0).all()


@pytest.mark.parametrize("decay", [0.0, 0.9, 1.0])
def test_ema_moves_by_its_formula(build: Callable[..., Any], decay: float) -> None:
    _, keys, _ = tables()
    router = build(AvgKConfig(descriptor="ema", decay=decay))
    torch.manual_seed(1)
    expected, seen = by_hand("mean", keys), torch.zeros(12, dtype=torch.bool)
    for step in range(4):
        torch.testing.assert_close(router.descriptor(keys, 1), expected, rtol=1e-5, atol=1e-7)
        sums, counts = torch.zeros(12, 6).double(), torch.zeros(12)
        for _ in range(2):  # microbatches
            x = torch.randn(1, 6).double()
            ids = router(x, keys).block_ids
            assert torch.equal(ids, route_topk(x @ router.descriptor(keys, 1).T, 4))
            for t in range(1):
                sums[ids[t]] += x[t]
                counts[ids[t]] += 1
        torch.testing.assert_close(router.descriptor(keys, 1), expected, rtol=1e-5, atol=1e-7)
        router.end_step()
        for block in range(12):
            if counts[block]:
                mean = sums[block] / counts[block]
                before = expected[block] if seen[block] else mean
                expected[block] = decay * before + (1 - decay) * mean
                seen[block] = True
        assert step > 0 or not seen.all(), "in the first step some block must have no token"
    assert router.descriptor(keys, 1).dtype == torch.float64


def test_ema_ignores_blocks_that_no_token_chose_and_tokens_of_evaluation(
    build: Callable[..., Any],
) -> None:
    x, keys, _ = tables()
    router = build(AvgKConfig(descriptor="ema"))
    mean = by_hand("mean", keys)
    router.eval()
    router(x, keys)
    router.train()
    with torch.no_grad():
        router(x, keys)  # the first pass of a recomputed layer
    router.end_step()
    assert torch.equal(router.descriptor(keys, 1), mean)
    ids = router(x[:1], keys).block_ids[0]
    router.end_step()
    average = router.descriptor(keys, 1)
    other_blocks = [block for block in range(12) if block not in ids]
    assert torch.equal(average[other_blocks], mean[other_blocks])
    torch.testing.assert_close(average[ids], x[:1].expand(4, -1), rtol=1e-5, atol=1e-7)
    # Blocks that no token has chosen yet are described by the current keys.
    torch.testing.assert_close(
        router.descriptor(2 * keys, 1)[other_blocks], 2 * mean[other_blocks], **CLOSE
    )


def test_ema_leaves_out_blocks_that_were_dropped(build: Callable[..., Any]) -> None:
    x, keys, _ = tables()
    router = build(AvgKConfig(descriptor="ema", block_dropout=1.0))
    router(x, keys)
    router.end_step()
    assert torch.equal(router.descriptor(keys, 1), by_hand("mean", keys))


def moving_average() -> Tensor:
    """The averages after two steps of two microbatches each, of this rank's tokens."""
    layer = router_cases.build(
        Case(router="avg-k", options=(("descriptor", "ema"), ("decay", 0.7)))
    )
    data = parallel_state.get_data_parallel_group()
    tensor = parallel_state.get_tensor_model_parallel_group()
    for step in range(2):
        for microbatch in range(2):
            hidden = router_cases.draw(10 * step + microbatch, S, BATCH, D)
            hidden = hidden.chunk(data.size(), dim=1)[data.rank()]
            layer(hidden.chunk(tensor.size())[tensor.rank()])
        layer.router.end_step()
    return layer.router.descriptor(layer.experts.keys, 1).detach()


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (2, {}),
        (2, {"tensor_model_parallel_size": 2}),
        (2, {"expert_model_parallel_size": 2}),
        (4, {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2}),
    ],
)
def test_ema_is_the_same_on_any_layout(ranks: int, layout: dict[str, int]) -> None:
    (expected,) = run_ranks(1, moving_average)
    results = run_ranks(ranks, moving_average, **layout)
    for result in results:
        assert torch.equal(result, results[0])
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)


def test_ema_stays_in_fp32_in_half_precision_models(build: Callable[..., Any]) -> None:
    x, keys, _ = tables()
    router = build(AvgKConfig(descriptor="ema"))
    router(x, keys)
    router.end_step()
    # As Megatron wraps a model: everything is narrowed, then modules with the hook are asked.
    router.bfloat16()
    for module in router.modules():
        if hasattr(module, "_maintain_float32_expert_bias"):
            module._maintain_float32_expert_bias()
    for name, buffer in router.named_buffers():
        assert buffer.dtype == torch.float32, name
    before = router.descriptor.average.clone()
    router(x.bfloat16(), keys.bfloat16())
    router.end_step()
    change = (router.descriptor.average - before).abs().max()
    assert 0 < change < 0.1, "1 % of a step is less than bfloat16 resolves"
    assert {"descriptor.average", "descriptor.started"} <= set(router.state_dict())


def test_a_moving_average_is_never_cached(build: Callable[..., Any]) -> None:
    x, keys, _ = tables()
    router = build(AvgKConfig(descriptor="ema"))
    router.weights_version = 0
    first = router(x, keys).block_ids
    router.end_step()
    second = router(x, keys).block_ids
    assert torch.equal(second, route_topk(x @ router.descriptor(keys, 1).T, 4))
    assert not torch.equal(first, second)


def test_undefined_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="--sffn-descriptor median is unknown"):
        AvgKConfig(descriptor="median")
    with pytest.raises(ConfigError, match="needs --sffn-descriptor subset and at most the 2"):
        transformer(AvgKConfig(descriptor="subset", subset_cells=3))
    with pytest.raises(ConfigError, match="needs --sffn-descriptor subset"):
        transformer(AvgKConfig(subset_cells=1))
    with pytest.raises(ConfigError, match="no gradient reaches the weights of --sffn-router avg-k"):
        transformer(AvgKConfig(descriptor="learned"))
    with pytest.raises(ConfigError, match="nothing to learn with --sffn-block-size 1"):
        transformer(AvgKConfig(descriptor="learned", gate="sigmoid"), block_size=1)


def test_learned_weights_learn_from_a_load_balancing_loss_alone(one_rank: None) -> None:
    balance = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.01}
    config = transformer(AvgKConfig(descriptor="learned"), **balance)
    router = AvgKRouter(
        config=config, pg_collection=ProcessGroupCollection.use_mpu_process_groups()
    )
    router.set_layer_number(1)
    x, keys, _ = tables()
    routing = router(x, keys)
    assert routing.gates is None
    routing.queries.sum().backward()
    assert router.descriptor.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("g", [1, 2, 8])
def test_a_subset_has_a_quarter_of_the_cells_by_default(g: int, one_rank: None) -> None:
    config = transformer(AvgKConfig(descriptor="subset"), block_size=g)
    assert isinstance(config.sffn, SparseFFNConfig)
    router = AvgKRouter(
        config=config, pg_collection=ProcessGroupCollection.use_mpu_process_groups()
    )
    keys = F.one_hot(torch.arange(g) % 6, 6).double().expand(24 // g, g, 6)
    # The mean of one-hot keys shows which keys it averages.
    vectors = router.descriptor(keys, 1)
    torch.testing.assert_close(vectors.sum(dim=1), torch.ones(24 // g).double(), **CLOSE)
    cells = max(1, g // 4)
    assert ((vectors * cells - (vectors * cells).round()).abs() < 1e-12).all()
