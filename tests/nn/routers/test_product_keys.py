"""Product keys: PKM, PKM with ReLU, PKM-FFN (methods P1-P3)."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_sffn.nn.layer import SparseFFN
from megatron_sffn.nn.routers.pkm import PKMConfig
from megatron_sffn.nn.routers.pkm_ffn import PKMFFNConfig
from megatron_sffn.nn.routers.pkm_relu import PKMReLUConfig
from megatron_sffn.utils.errors import ConfigError
from tests.nn.routers.conftest import D, transformer

T, HEADS, SIDE, HALF = 30, 2, 6, 3
NUMBERS = {"active_cells": 12, "block_size": 1, "expansion": 3}  # M = 36 cells, 6 sub-keys
CLOSE = {"rtol": 1e-10, "atol": 1e-12}
CONFIGS = {
    "pkm": PKMConfig(heads=HEADS, key_size=2 * HALF),
    "pkm-relu": PKMReLUConfig(heads=HEADS, key_size=2 * HALF),
    "pkm-ffn": PKMFFNConfig(key_size=2 * HALF),
}


def fill(router, *, integers: bool = False) -> Tensor:
    """Give a router large weights, and tokens; integers make many exact ties."""
    torch.manual_seed(5)
    with torch.no_grad():
        for weight in router.parameters():
            weight.copy_(torch.randint(-1, 2, weight.shape) if integers else weight.normal_())
    return (torch.randint(-1, 2, (T, D)) if integers else torch.randn(T, D)).double()


def all_sums(router, x: Tensor) -> Tensor:
    """`[T, heads, n, n]` scores of every pair of sub-keys, one pair at a time."""
    heads, _, side, half = router.subkeys.shape
    sums = torch.empty(len(x), heads, side, side, dtype=torch.float64)
    for head in range(heads):
        rows = slice(2 * half * head, 2 * half * (head + 1))
        query = x @ router.query[rows].T
        if router.query_bias is not None:
            query = query + router.query_bias[rows]
        for i, j in itertools.product(range(side), range(side)):
            first = query[:, :half] @ router.subkeys[head, 0, i]
            second = query[:, half:] @ router.subkeys[head, 1, j]
            sums[:, head, i, j] = first + second
    return sums.detach()


def brute_force(scores: list[float], count: int) -> set[int]:
    """Indices of the largest scores; of equal scores the lowest indices."""
    return set(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count])


@pytest.mark.parametrize("integers", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_p1_the_best_of_all_sums_are_chosen(build, name: str, integers: bool) -> None:
    router = build(CONFIGS[name], **NUMBERS)
    x = fill(router, integers=integers)
    sums, ids = all_sums(router, x), router(x, None).block_ids
    heads = sums.shape[1]
    per_head = 12 // heads
    ids_by_head, ties = ids.view(T, heads, per_head), 0
    for t, head in itertools.product(range(T), range(heads)):
        flat = sums[t, head].flatten().tolist()
        assert set(ids_by_head[t, head].tolist()) == brute_force(flat, per_head)
        ranked = sorted(flat, reverse=True)
        ties += ranked[per_head - 1] == ranked[per_head]
    assert (ties > T * heads / 2) if integers else ties == 0


@pytest.mark.parametrize("per_head", [1, 2, 6, 7, 20, 36])
def test_p1_the_choice_is_right_for_any_number_of_chosen_cells(build, per_head: int) -> None:
    # Some numbers are larger than the 6 sub-keys of a half.
    numbers = {"block_size": 1, "active_cells": 36, "expansion": 1}
    router = build(PKMFFNConfig(key_size=2 * HALF), **numbers)
    router.blocks_per_head = per_head
    x = fill(router, integers=True)
    sums = all_sums(router, x).flatten(1)
    for row, chosen in zip(sums.tolist(), router(x, None).block_ids.tolist(), strict=True):
        assert set(chosen) == brute_force(row, per_head)
        assert len(chosen) == per_head


@pytest.mark.parametrize("name", CONFIGS)
def test_p2_values_and_gradients_use_one_index_map(one_rank: None, name: str) -> None:
    layer = SparseFFN(transformer(CONFIGS[name], **NUMBERS), layer_number=1)
    x = fill(layer.router)
    with torch.no_grad():
        layer.router.subkeys.mul_(0.01)
        # Each head has one cell so far ahead that a softmax gives it a weight of 1.
        pairs = [(4, 1), (2, 5)][: layer.router.subkeys.shape[0]]
        layer.router.query.zero_()
        if layer.router.query_bias is None:
            layer.router.query[:, 0] = 1.0
            x[:, 0] = 1.0
        else:
            layer.router.query_bias.fill_(1.0)
        for head, (i, j) in enumerate(pairs):
            layer.router.subkeys[head, 0, i] = 100.0
            layer.router.subkeys[head, 1, j] = 1000.0
        layer.experts.values.copy_(
            torch.arange(36.0)[:, None, None].expand_as(layer.experts.values)
        )
    routings = []
    layer.trained.register_forward_pre_hook(lambda module, args: routings.append(args[0]))
    y, _ = layer(x[:, None])
    cells = [i * SIDE + j for i, j in pairs]
    ids = routings[0].block_ids.view(T, len(pairs), -1)
    gates = routings[0].gates.view_as(ids)
    for head, cell in enumerate(cells):
        assert (ids[:, head] == cell).any(dim=1).all()
    # With values equal to their index, the output shows which rows were summed.
    expected = (gates * ids).sum(dim=(1, 2))
    torch.testing.assert_close(y[:, 0], expected[:, None].expand(T, D), **CLOSE)
    if name == "pkm":
        torch.testing.assert_close(
            y[:, 0], torch.full_like(y[:, 0], sum(cells)), rtol=1e-10, atol=1e-8
        )
    y.sum().backward()
    grads = layer.experts.values.grad[:, 0, 0]
    expected_grads = torch.zeros(36, dtype=torch.float64).index_add(
        0, ids.flatten(), gates.detach().flatten()
    )
    torch.testing.assert_close(grads, expected_grads, **CLOSE)
    assert set(grads.topk(len(cells)).indices.tolist()) == set(cells)


def test_p3_the_weights_of_a_head_sum_to_1(build) -> None:
    router = build(CONFIGS["pkm"], **NUMBERS)
    x = fill(router)
    routing = router(x, None)
    weights = routing.gates.view(T, HEADS, -1)
    torch.testing.assert_close(weights.sum(2), torch.ones(T, HEADS).double(), **CLOSE)
    chosen = all_sums(router, x).flatten(2).gather(2, routing.block_ids.view(T, HEADS, -1))
    expected = chosen.exp() / chosen.exp().sum(2, keepdim=True)
    torch.testing.assert_close(weights, expected, **CLOSE)


@pytest.mark.parametrize("name", ["pkm-relu", "pkm-ffn"])
def test_p3_with_all_cells_the_relu_form_is_the_dense_ffn_of_joined_keys(
    one_rank: None, name: str
) -> None:
    config = PKMReLUConfig(heads=1, key_size=6) if name == "pkm-relu" else PKMFFNConfig(key_size=6)
    numbers = {"active_cells": 36, "block_size": 1, "expansion": 1, "activation_func": F.relu}
    layer = SparseFFN(transformer(config, **numbers), layer_number=1)  # k = n²
    x = fill(layer.router)
    c, c2 = layer.router.subkeys[0]
    keys = torch.stack([torch.cat((c[i], c2[j])) for i in range(SIDE) for j in range(SIDE)])
    query = F.linear(x, layer.router.query, layer.router.query_bias)
    weights = torch.randn(T, D).double()
    leaves = list(layer.parameters())
    y, _ = layer(x[:, None])
    dense = F.relu(query @ keys.T) @ layer.experts.values[:, 0]
    torch.testing.assert_close(y[:, 0], dense, **CLOSE)
    actual_grads = torch.autograd.grad((y[:, 0] * weights).sum(), leaves)
    expected_grads = torch.autograd.grad((dense * weights).sum(), leaves)
    for a, b in zip(actual_grads, expected_grads, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_heads_that_choose_one_cell_add_up(one_rank: None) -> None:
    layer = SparseFFN(transformer(CONFIGS["pkm"], **NUMBERS), layer_number=1)
    x = fill(layer.router)
    with torch.no_grad():
        for weight in (layer.router.query, layer.router.query_bias, layer.router.subkeys):
            first, second = weight.chunk(2)
            second.copy_(first)
    y, _ = layer(x[:, None])
    routing = layer.router(x, None)
    ids, gates = (by_token.view(T, 2, -1) for by_token in (routing.block_ids, routing.gates))
    assert torch.equal(ids[:, 0], ids[:, 1])
    values = layer.experts.values[:, 0]
    one_head = (gates[:, 0, :, None] * values[ids[:, 0]]).sum(1)
    torch.testing.assert_close(y[:, 0], 2 * one_head, **CLOSE)


def test_pkm_ffn_has_the_models_activation_and_no_softmax(build) -> None:
    for activation in ("relu", "gelu"):
        f = getattr(F, activation)
        router = build(CONFIGS["pkm-ffn"], **NUMBERS, activation_func=f)
        x = fill(router)
        routing = router(x, None)
        expected = f(all_sums(router, x).flatten(1).gather(1, routing.block_ids))
        torch.testing.assert_close(routing.gates, expected, **CLOSE)


@pytest.mark.parametrize("name", CONFIGS)
def test_subkeys_learn_through_chosen_cells_alone(build, name: str) -> None:
    router = build(CONFIGS[name], **NUMBERS)
    x = fill(router)
    routing = router(x[:1], None)
    routing.gates.square().sum().backward()
    ids = routing.block_ids.view(router.subkeys.shape[0], -1)
    for head, chosen in enumerate(ids):
        for half, indices in enumerate((chosen // SIDE, chosen % SIDE)):
            used = torch.zeros(SIDE, dtype=torch.bool)
            used[indices] = True
            grad = router.subkeys.grad[head, half]
            assert (grad[~used] == 0).all()
    assert router.query.grad.abs().sum() > 0


LARGE = {"active_cells": 64, "block_size": 1, "expansion": 64}  # M = 64² cells


@pytest.mark.parametrize("name", ["pkm", "pkm-relu", "pkm-ffn"])
def test_weights_start_with_their_documented_distributions(one_rank: None, name: str) -> None:
    kinds = {"pkm": PKMConfig, "pkm-relu": PKMReLUConfig, "pkm-ffn": PKMFFNConfig}
    config = transformer(kinds[name](key_size=64), **LARGE, params_dtype=torch.float32)
    layer = SparseFFN(config, layer_number=1)
    router, values = layer.router, layer.experts.values
    layers, cells = 2, 64**2
    stds = {
        "pkm": (1 / math.sqrt(32) / math.sqrt(3), D**-0.5, 0.02),
        "pkm-relu": (math.sqrt(2 / (layers * 64)), math.sqrt(2 / (layers * cells)), None),
        "pkm-ffn": (0.02, 0.02 / math.sqrt(2 * layers), 0.02),
    }[name]
    query = stds[2] or math.sqrt(2 / (layers * D))
    for weight, std in ((router.subkeys, stds[0]), (values, stds[1]), (router.query, query)):
        assert weight.std().item() == pytest.approx(std, abs=5 * std / math.sqrt(weight.numel()))
    if name == "pkm":
        bound = 1 / math.sqrt(32)
        assert router.subkeys.abs().max() <= bound
        assert router.subkeys.abs().max() > 0.99 * bound
    if name != "pkm-ffn":
        assert (router.query_bias == 0).all()


def test_blocks_of_product_keys_have_values_only(one_rank: None) -> None:
    for name, config in CONFIGS.items():
        layer = SparseFFN(transformer(config, **NUMBERS), layer_number=1)
        names = {"experts.values", "router.query", "router.subkeys"}
        bias = set() if name == "pkm-ffn" else {"router.query_bias"}
        assert set(layer.state_dict()) == names | bias
        assert layer.router.subkeys.shape == (config.num_heads, 2, SIDE, HALF)


@pytest.mark.parametrize(
    ("config", "numbers", "sentence"),
    [
        (PKMConfig(), {"block_size": 2}, "--sffn-block-size 2; use --sffn-block-size 1"),
        (PKMConfig(key_size=7), {}, "use 6 or 8"),
        (PKMConfig(heads=5), {}, "--sffn-pkm-heads 5 does not divide the 12 active cells"),
        (PKMConfig(), {"expansion": 4}, "needs a square number of cells, not 48 .* one: 3 or 12"),
    ],
)
def test_undefined_settings_are_refused(config, numbers: dict[str, int], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        transformer(config, **NUMBERS | numbers)


def test_pkm_ffn_has_no_second_key_for_swiglu() -> None:
    with pytest.raises(ConfigError, match="--swiglu and --quick-geglu need two keys per cell"):
        transformer(CONFIGS["pkm-ffn"], **NUMBERS, activation_func=F.silu, gated_linear_unit=True)
