"""The framework (methods F1-F7), for every router: layers on one rank, in float64.

The oracle (F7) uses none of our blocks, dispatch or top-K: it has all M coefficients and a mask.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_sffn.nn.routers import ROUTERS, rand_hash
from megatron_sffn.nn.routers.avg_k import AvgKRouter
from megatron_sffn.nn.routers.learned import LearnedRouter
from megatron_sffn.nn.routers.product_keys import ProductKeysRouter
from megatron_sffn.nn.routers.scored import ScoredRouter
from megatron_sffn.nn.routers.vanilla_m import VanillaMRouter
from tests.support import router_cases
from tests.support.router_cases import BATCH, SINGLE_CELLS, SPARSE, Case, D, S

pytestmark = pytest.mark.usefixtures("one_rank")

GATE_FREE = [*(name for name in SPARSE if not ROUTERS[name]().gated_output), "pkm-ffn"]
"""Methods whose block outputs have no factor; pkm-ffn's coefficients are f of its scores."""
LEAVES_SLOTS_EMPTY = ["remoe"]
"""Methods that give a token fewer blocks than K, by their definition."""
IN_BLOCKS = [name for name in SPARSE if name not in SINGLE_CELLS]


def sizes(routers: list[str], *block_sizes: int) -> list[tuple[str, int]]:
    """Pairs of a router and a block size that it supports."""
    return [(name, g) for name in routers for g in block_sizes if g == 1 or name in IN_BLOCKS]


CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def without_losses(router: str, **fields: Any) -> Case:
    """A layer in which tokens are independent: no auxiliary loss; S-BASE's choice of evaluation."""
    no_loss = (("moe_router_load_balancing_type", "none"),)
    return Case(router=router, megatron=no_loss, training=router != "s-base", **fields)


def tokens() -> tuple[Tensor, Tensor]:
    """Hidden states `[S, BATCH, D]` and ids `[BATCH, S]`."""
    hidden, ids, _ = router_cases.inputs()
    return hidden, ids


def run(layer: Any, hidden: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """`[T, D]` outputs, `[T, K]` block ids and gates of a layer; -1 in slots that may be empty."""
    routings: list[Any] = []
    counter = layer.trained if layer.training else layer.evaluated
    hook = counter.register_forward_pre_hook(lambda module, args: routings.append(args[0]))
    y, bias = layer(hidden, padding_mask=ids)
    hook.remove()
    assert bias is None
    return y.flatten(0, 1), routings[0].block_ids, routings[0].gates


def largest(scores: Tensor, count: int) -> Tensor:
    """Mask `[T, B]`: 1 where a score is among the largest of its row, if there are no ties."""
    least = scores.sort(dim=1, descending=True).values[:, count - 1 : count]
    return (scores >= least).to(scores.dtype)


def product_coefficients(name: str, layer: Any, x: Tensor) -> Tensor:
    """Factors `[T, B]` of blocks or cells, summed over heads, by enumeration of all sums."""
    router = layer.router
    heads, _, side, half = router.subkeys.shape
    total = x.new_zeros(len(x), side * side)
    for head in range(heads):
        rows = slice(head * 2 * half, (head + 1) * 2 * half)
        query = x @ router.query[rows].T
        if router.query_bias is not None:
            query = query + router.query_bias[rows]
        subkeys = router.subkeys[head]
        if router.query_norm is not None:
            subkeys = subkeys / (subkeys.square().mean(-1, keepdim=True) + 1e-6).sqrt()
            halves = query.view(-1, 2, half)
            halves = halves / (halves.square().mean(-1, keepdim=True) + 1e-6).sqrt()
            query = (halves * router.query_norm).flatten(1)
        keys = torch.stack(
            [torch.cat((subkeys[0, i], subkeys[1, j])) for i in range(side) for j in range(side)]
        )
        scores = query @ keys.T
        mask = largest(scores.detach(), router.sffn.num_active_blocks // heads)
        if name in ("pkm", "peer", "memory-plus"):
            weights = scores.exp() * mask
            total = total + weights / weights.sum(dim=1, keepdim=True)
        else:
            total = total + mask * (F.relu(scores) if name == "pkm-relu" else F.gelu(scores))
    return total


def block_factors(name: str, layer: Any, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """`[T, B]` factor of each block, 0 where it is not chosen, and the `[T, width]` queries."""
    router, (keys, _) = layer.router, layer.experts()
    count, queries = router.sffn.num_active_blocks, x
    if isinstance(router, ProductKeysRouter):
        return product_coefficients(name, layer, x), queries
    if not isinstance(router, ScoredRouter):  # the tests of rand-hash check its blocks
        mask = x.new_zeros(len(x), router.sffn.num_blocks).scatter(1, ids, 1.0)
        return mask, queries
    if isinstance(router, AvgKRouter):
        scores = torch.einsum("td,bgd->tb", x, keys) / keys.shape[1]
    elif isinstance(router, VanillaMRouter):
        queries = x @ router.down.T if name == "lorkm" else x
        scores = F.gelu(torch.einsum("td,bgd->tbg", queries, keys)).sum(2) / keys.shape[1]
    elif isinstance(router, LearnedRouter):
        scores = x @ router.weight.T
    else:  # a score of the router's own, which its own tests check
        queries = router.query(x)
        scores = router.score(x, queries, keys)
    mask, weights = largest(scores.detach(), count), scores.exp()
    match router.settings.gate:
        case "none":
            return mask, queries
        case "relu":
            return mask * scores.relu(), queries
        case "sigmoid":
            return mask / (1 + (-scores).exp()), queries
        case "softmax":
            return mask * weights / weights.sum(dim=1, keepdim=True), queries
        case gate:
            assert gate == "softmax-chosen", gate
            return mask * weights / (weights * mask).sum(dim=1, keepdim=True), queries


def oracle(name: str, layer: Any, x: Tensor, ids: Tensor) -> Tensor:
    """F7: `y = (f(x Kᵀ) · mask) V`, times the gate where there is one."""
    keys, values = layer.experts()
    values = values.flatten(0, 1)
    if keys is None:
        sums = product_coefficients(name, layer, x) @ values
        if name == "memory-plus":
            router = layer.router
            sums = (sums * F.silu(x @ router.output_gate.T)) @ router.output_projection.T
        return sums
    factors, queries = block_factors(name, layer, x, ids)
    factors = factors.repeat_interleave(layer.router.sffn.block_size, dim=1)
    return (F.gelu(queries @ keys.flatten(0, 1).T) * factors) @ values


CONSTANT_GATE = [
    (name, 16) for name in SPARSE if getattr(ROUTERS[name](), "gate", None) == "softmax-chosen"
]
"""Routers and block sizes at which one block is chosen, whose share of its own softmax is 1."""


NORMED_KEYS = (("key_norm", True),)


@pytest.mark.parametrize(
    ("router", "g", "options"),
    [
        *((*size, ()) for size in sizes(SPARSE, 1, 4, 16) if size not in CONSTANT_GATE),
        *((router, 1, NORMED_KEYS) for router in ("pkm-relu", "pkm-ffn", "memory-plus")),
        ("peer", 4, NORMED_KEYS),
    ],
)
def test_f7_output_and_every_gradient_are_those_of_the_masked_dense_ffn(
    router: str, g: int, options: tuple[tuple[str, Any], ...]
) -> None:
    case = without_losses(router, block_size=g, options=options)
    layer = router_cases.build(case).train(case.training)
    hidden, ids = tokens()
    weights = router_cases.draw(5, S * BATCH, D)
    leaves = dict(layer.named_parameters())
    x = hidden.clone().requires_grad_()
    y, chosen, _ = run(layer, x, ids)
    actual_grads = torch.autograd.grad(
        (y * weights).sum(), [x, *leaves.values()], allow_unused=True
    )
    oracle_x = hidden.clone().requires_grad_()
    expected = oracle(router, layer, oracle_x.flatten(0, 1), chosen)
    expected_grads = torch.autograd.grad(
        (expected * weights).sum(), [oracle_x, *leaves.values()], allow_unused=True
    )
    torch.testing.assert_close(y, expected, **CLOSE)
    for name, a, b in zip(["x", *leaves], actual_grads, expected_grads, strict=True):
        if a is None or b is None:  # the noise, whose factor is 0 here
            assert a is b or not (b if a is None else a).any(), name
            continue
        torch.testing.assert_close(a, b, **CLOSE, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize(("router", "g"), sizes(GATE_FREE, 1, 2, 4, 8, 16))
def test_f1_f2_f3_all_blocks_without_a_gate_are_the_dense_ffn(
    router: str, g: int, swiglu: bool
) -> None:
    if router == "pkm-ffn":
        swiglu = False  # it has no second key for a cell, and refuses SwiGLU
    # E = 1: M = k = 16 cells, and b = B.
    layer = router_cases.build(without_losses(router, block_size=g, expansion=1, swiglu=swiglu))
    hidden, ids = tokens()
    x = hidden.flatten(0, 1)
    y, _, _ = run(layer, hidden, ids)
    keys, values = layer.experts()
    if router == "pkm-ffn":
        c, c2 = layer.router.subkeys[0]
        full_keys = torch.cat((c.repeat_interleave(4, dim=0), c2.repeat(4, 1)), dim=1)
        dense = F.gelu(x @ layer.router.query.T @ full_keys.T) @ values.flatten(0, 1)
    else:
        queries = x @ layer.router.down.T if router == "lorkm" else x
        key_tables = keys.chunk(2, dim=1) if swiglu else (keys,)
        up = torch.cat([queries @ key_table.flatten(0, 1).T for key_table in key_tables], dim=1)
        dense = layer.activation(up) @ values.flatten(0, 1)
    torch.testing.assert_close(y, dense, **CLOSE)


@torch.no_grad()
def permute_blocks(layer: Any, patch: pytest.MonkeyPatch) -> Tensor:
    """Permute blocks and their weights in the router; returns the old index of each block."""
    router, grid = layer.router, layer.experts.expert_grid
    order = torch.randperm(grid.num_blocks)
    if isinstance(router, ProductKeysRouter):
        rows, columns = torch.randperm(router.side), torch.randperm(router.side)
        router.subkeys[:, 0] = router.subkeys[:, 0, rows]
        router.subkeys[:, 1] = router.subkeys[:, 1, columns]
        order = (rows[:, None] * router.side + columns).flatten()
    elif isinstance(router, rand_hash.RandHashRouter):
        subsets, inverse = rand_hash.hashed_subsets, order.argsort()
        patch.setattr(rand_hash, "hashed_subsets", lambda *a, **k: inverse[subsets(*a, **k)])
    for name in ("weight", "noise_weight"):
        if hasattr(router, name):
            getattr(router, name).copy_(getattr(router, name)[order])
    for table in layer.experts.parameters():
        table.copy_(table[order])
    return order


@pytest.mark.parametrize("router", SPARSE)
def test_f4_the_order_of_blocks_does_not_matter(
    router: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = without_losses(router)
    layer = router_cases.build(case).train(case.training)
    before, chosen, _ = run(layer, *tokens())
    torch.manual_seed(0)
    order = permute_blocks(layer, monkeypatch)
    after, permuted, _ = run(layer, *tokens())
    torch.testing.assert_close(after, before, **CLOSE)
    assert not torch.equal(permuted.sort(dim=1).values, chosen.sort(dim=1).values)
    old_ids = order[permuted].where(permuted >= 0, -1)  # an empty slot stays empty
    assert torch.equal(old_ids.sort(dim=1).values, chosen.sort(dim=1).values)


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("router", IN_BLOCKS)
def test_f4_the_order_of_cells_in_a_block_does_not_matter(router: str, swiglu: bool) -> None:
    case = without_losses(router, swiglu=swiglu)
    layer = router_cases.build(case).train(case.training)
    before, chosen, _ = run(layer, *tokens())
    torch.manual_seed(0)
    with torch.no_grad():
        for block in range(layer.router.sffn.num_blocks):  # each block gets its own order
            order = torch.randperm(4)
            for table in layer.experts.parameters():
                cells = table[block].view(-1, 4, table.shape[2])
                table[block] = cells[:, order].flatten(0, 1)
    after, ids_after, _ = run(layer, *tokens())
    torch.testing.assert_close(after, before, **CLOSE)
    assert torch.equal(ids_after, chosen)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("router", SPARSE)
def test_f5_a_token_has_exactly_b_distinct_blocks(router: str, training: bool) -> None:
    layer = router_cases.build(without_losses(router)).train(training)
    _, ids, gates = run(layer, *tokens())
    sffn = layer.router.sffn
    heads = getattr(sffn.router, "num_heads", 1)
    assert heads == sffn.router.test_numbers.options.get("heads", 1)
    assert ids.shape == (S * BATCH, sffn.num_active_blocks)
    assert ids.min() >= (-1 if router in LEAVES_SLOTS_EMPTY else 0)
    assert ids.max() < sffn.num_blocks
    for row in ids.tolist():
        per_head = len(row) // heads
        for head in range(heads):
            part = [block for block in row[head * per_head : (head + 1) * per_head] if block >= 0]
            assert len(set(part)) == len(part)
    assert (gates is not None) == sffn.router.gated_output
    assert gates is None or gates.shape == ids.shape


@pytest.mark.parametrize("router", SPARSE)
def test_f5_a_token_does_not_depend_on_its_batch_or_order(router: str) -> None:
    case = without_losses(router)
    layer = router_cases.build(case).train(case.training)
    hidden, ids = tokens()
    y, chosen, _ = run(layer, hidden, ids)
    y, chosen = y.view(S, BATCH, D), chosen.view(S, BATCH, -1)

    def assert_same(positions: Tensor, sequences: Tensor) -> None:
        """Assert that these tokens of these sequences alone have the same results."""
        outputs, block_ids, _ = run(
            layer, hidden[positions][:, sequences], ids[sequences][:, positions].contiguous()
        )
        torch.testing.assert_close(
            outputs.view(len(positions), len(sequences), D), y[positions][:, sequences], **CLOSE
        )
        expected = chosen[positions][:, sequences].flatten(0, 1)
        assert torch.equal(block_ids.sort(dim=1).values, expected.sort(dim=1).values)

    torch.manual_seed(0)
    assert_same(torch.randperm(S), torch.randperm(BATCH))
    assert_same(torch.tensor([3]), torch.tensor([2]))
    assert_same(torch.arange(S - 2), torch.arange(1, BATCH))


@pytest.mark.parametrize("router", SPARSE)
def test_f6_cells_that_no_token_chose_get_exactly_no_gradient(router: str) -> None:
    case = without_losses(router)
    layer = router_cases.build(case).train(case.training)
    hidden, ids = tokens()
    y, chosen, _ = run(
        layer, hidden[:1], ids[:, :1]
    )  # few tokens, so that some blocks are not chosen
    y.square().sum().backward()
    used = torch.zeros(layer.router.sffn.num_blocks, dtype=torch.bool)
    used[chosen[chosen >= 0]] = True
    assert used.any() and not used.all()
    for table in layer.experts.parameters():
        assert (table.grad[~used] == 0).all()
        # Only ReLU gives chosen cells a gradient of zero, too.
        has_gradient = table.grad[used].flatten(1).any(dim=1)
        assert has_gradient.all() or (router == "pkm-relu" and has_gradient.any())


def test_every_router_is_in_these_tests() -> None:
    assert {*SPARSE, "dense"} == set(ROUTERS)
    assert {"avg-k", "vanilla-m", "lorkm", "rand-hash", "top-k-act", "pkm-ffn"} <= {*GATE_FREE}
