"""All routers with scores: gates, block dropout (M3), and the flag for NaN and infinite scores."""

import math

import pytest
import torch
import torch.nn.functional as F

from megatron_sffn.nn.layer import SparseFFN
from megatron_sffn.nn.routers import ROUTERS
from megatron_sffn.nn.routers.avg_k import AvgKConfig
from megatron_sffn.nn.routers.gates import GATES
from megatron_sffn.nn.routers.scored import ScoredConfig
from megatron_sffn.ops import route_topk
from megatron_sffn.utils.errors import ConfigError
from tests.nn.routers.conftest import tables, transformer
from tests.support import router_cases

SCORED = [name for name, config in ROUTERS.items() if issubclass(config, ScoredConfig)]


def score_by_hand(name: str, router, x: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Scores `[T, B]` of the methods whose score is computed from keys."""
    if name == "avg-k":
        return torch.stack([(x @ block.T).mean(1) for block in keys], dim=1)
    query = x @ router.down.T if name == "lorkm" else x
    return torch.stack([F.gelu(query @ block.T).mean(1) for block in keys], dim=1)


def gates_by_hand(gate: str, scores: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Gates `[T, K]`, from their definition."""
    functions = {
        "sigmoid": 1 / (1 + (-scores).exp()),
        "sqrt-softplus": (1 + scores.exp()).log().sqrt(),
        "softmax": scores.exp() / scores.exp().sum(1, keepdim=True),
        "relu": scores * (scores > 0),
    }
    factors = functions[gate.removesuffix("-chosen")].gather(1, ids)
    return factors / factors.sum(1, keepdim=True) if gate.endswith("-chosen") else factors


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("name", ["avg-k", "vanilla-m", "lorkm"])
def test_a_gate_is_a_differentiable_function_of_the_score(build, name: str, gate: str) -> None:
    x, keys, _ = (t.requires_grad_() for t in tables())
    options = {"rank": x.shape[1]} if name == "lorkm" else {}
    router = build(ROUTERS[name](gate=gate, **options))
    routing = router(x, keys, None)
    scores = score_by_hand(name, router, x, keys)
    ids = route_topk(scores, 4)
    assert torch.equal(routing.block_ids, ids)
    torch.testing.assert_close(routing.scores, scores.detach().gather(1, ids), rtol=1e-10, atol=0)
    if gate == "none":
        assert routing.gates is None
        return
    expected = gates_by_hand(gate, scores, ids)
    torch.testing.assert_close(routing.gates, expected, rtol=1e-10, atol=1e-12)
    leaves = (x, keys, *router.parameters())
    actual_grads = torch.autograd.grad(routing.gates.square().sum(), leaves)
    expected_grads = torch.autograd.grad(expected.square().sum(), leaves)
    for a, b in zip(actual_grads, expected_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("gate", "factor", "sentence"),
    [
        ("none", 2.5, "scaling-factor 2.5 multiplies gates, and --sffn-gate is none; leave it out"),
        ("sigmoid", 0.0, "scaling-factor 0 is not a finite number above 0"),
        ("sigmoid", math.inf, "scaling-factor inf is not a finite number above 0"),
    ],
)
def test_a_scale_without_gates_or_of_0_is_refused(gate: str, factor: float, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        transformer(AvgKConfig(gate=gate), moe_router_topk_scaling_factor=factor)


def test_an_unknown_gate_is_refused() -> None:
    with pytest.raises(ConfigError, match="--sffn-gate relu-chosen is unknown; choose from none"):
        AvgKConfig(gate="relu-chosen")


def built(name: str, **options):
    """A layer of this router in training, 12 or more blocks."""
    return router_cases.build(router_cases.Case(router=name, options=tuple(options.items())))


def routed(layer) -> tuple[torch.Tensor, torch.Tensor]:
    """The ids that a layer chooses for 24 tokens, and its output."""
    ids_seen = []
    counter = layer.trained if layer.training else layer.evaluated
    hook = counter.register_forward_pre_hook(
        lambda module, args: ids_seen.append(args[0].block_ids)
    )
    hidden, ids, _ = router_cases.inputs()
    y, _ = layer(hidden, padding_mask=ids)
    hook.remove()
    return ids_seen[0], y


@pytest.mark.parametrize("name", SCORED)
def test_m3_blocks_are_dropped_in_training_only(one_rank: None, name: str) -> None:
    plain, dropping = built(name), built(name, block_dropout=0.5)
    for layer in (plain, dropping):
        layer.eval()
    assert torch.equal(routed(dropping)[0], routed(plain)[0])
    dropping.train()
    torch.manual_seed(1)
    ids = routed(dropping)[0]
    assert not torch.equal(ids, routed(dropping)[0]), "each microbatch draws anew"
    full_rows = ids[(ids >= 0).all(dim=1)]
    assert len(full_rows) and (full_rows.sort(dim=1).values.diff(dim=1) > 0).all()


@pytest.mark.parametrize("rate", [0.05, 0.5, 0.9])
def test_m3_a_block_is_dropped_at_its_rate(build, rate: float) -> None:
    # Of 12 blocks the 4 best are always the same: a block above them is missing where dropped.
    tokens = 20_000
    router = build(AvgKConfig(block_dropout=rate))
    keys = torch.arange(12.0).flip(0)[:, None, None].expand(12, 2, 6).contiguous()
    torch.manual_seed(0)
    ids = router(torch.ones(tokens, 6), keys, None).block_ids
    for block in range(4):
        dropped = tokens - int((ids == block).any(dim=1).sum())
        sigma = math.sqrt(tokens * rate * (1 - rate))
        assert abs(dropped - tokens * rate) < 5 * sigma, block
    # Blocks are dropped independently: the rate of two together is the product of their rates.
    both_dropped = ((ids != 0).all(dim=1) & (ids != 1).all(dim=1)).sum()
    sigma = math.sqrt(tokens * rate**2 * (1 - rate**2))
    assert abs(int(both_dropped) - tokens * rate**2) < 5 * sigma
    # The next best blocks take the free places: the best of the blocks that are not dropped.
    filled = (ids >= 0).sum(dim=1)
    remaining = torch.distributions.Binomial(12, torch.tensor(1 - rate))
    short_share = remaining.log_prob(torch.arange(4.0)).exp().sum().item()
    short_tokens = int((filled < 4).sum())
    assert (
        abs(short_tokens - tokens * short_share)
        <= 5 * math.sqrt(tokens * short_share * (1 - short_share)) + 1
    )


def test_m3_the_best_of_the_remaining_blocks_are_chosen(build, monkeypatch) -> None:
    x, keys, _ = tables()
    router = build(AvgKConfig(block_dropout=0.6))
    drawn = torch.rand(len(x), 12, dtype=torch.float64)
    monkeypatch.setattr(torch, "rand_like", lambda like: drawn)
    ids = router(x, keys, None).block_ids
    scores = x @ keys.mean(1).T
    for t in range(len(x)):
        remaining = [b for b in range(12) if drawn[t, b] >= 0.6]
        best = sorted(remaining, key=lambda b: -float(scores[t, b]))[:4]
        assert sorted(ids[t].tolist()) == sorted(best + [-1] * (4 - len(best)))


@pytest.mark.parametrize("rate", [0.97, 1 - 1e-9, 1.0])
@pytest.mark.parametrize("name", SCORED)
def test_m3_with_dropout_near_1_outputs_are_finite_and_dropped_blocks_do_not_compute(
    one_rank: None, name: str, rate: float
) -> None:
    torch.manual_seed(0)
    layer = built(name, block_dropout=rate)
    ids, y = routed(layer)
    assert ids.min() == -1
    y.square().sum().backward()
    for weight in layer.parameters():
        assert weight.grad is None or weight.grad.isfinite().all()
    assert y.isfinite().all()
    empty = (ids < 0).all(dim=1)
    assert empty.any()
    assert (y.flatten(0, 1)[empty] == 0).all()
    if rate == 1.0:
        assert (ids == -1).all()


def test_m3_survivors_are_not_rescaled(build) -> None:
    x, keys, _ = tables()
    torch.manual_seed(0)
    routing = build(AvgKConfig(block_dropout=0.5, gate="sigmoid"))(x, keys, None)
    survived = routing.block_ids >= 0
    gates = (x @ keys.mean(1).T).sigmoid().gather(1, routing.block_ids.clamp(min=0))
    torch.testing.assert_close(routing.gates[survived], gates[survived], rtol=1e-10, atol=1e-12)


def poisoned(name: str, value: float, source: str):
    """A layer and hidden states; one number of them or of the score's weights is wrong."""
    layer = built(name)
    hidden, ids, _ = router_cases.inputs()
    if source == "tokens":
        hidden[2, 1, 3] = value
    else:
        weights = [w for w in (*layer.router.parameters(), layer.experts.keys) if w is not None]
        with torch.no_grad():
            weights[0].view(-1)[0] = value
    return layer, hidden, ids


@pytest.mark.parametrize("source", ["tokens", "weights"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", [name for name in router_cases.SPARSE if name != "rand-hash"])
def test_scores_that_are_nan_or_infinite_are_flagged(
    one_rank: None, name: str, value: float, source: str
) -> None:
    layer, hidden, ids = poisoned(name, value, source)
    for mode in (True, False):
        layer.train(mode).router.score_flag.zero_()
        layer(hidden, padding_mask=ids)[0].sum().backward()
        assert layer.router.score_flag.isnan()
    assert not any("score_flag" in name for name in layer.state_dict())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_score_that_is_not_finite_sets_the_flag(build, value: float) -> None:
    router = build(AvgKConfig())
    scores = torch.randn(20, 12)
    router.flag_not_finite(scores * 1e35)
    router.flag_not_finite(scores[:0])
    assert router.score_flag == 0
    scores[13, 7] = value
    router.flag_not_finite(scores)
    router.flag_not_finite(torch.zeros(3, 4))
    assert router.score_flag.isnan()


@pytest.mark.parametrize("name", SCORED)
def test_half_precision_tokens_have_scores_in_fp32(one_rank: None, name: str) -> None:
    test_numbers = ROUTERS[name].test_numbers
    numbers = test_numbers.layer(active_cells=8, block_size=2, expansion=3)
    config = transformer(
        ROUTERS[name](**test_numbers.options), params_dtype=torch.bfloat16, **numbers
    )
    layer = SparseFFN(config, layer_number=1)
    x = torch.randn(20, 6, dtype=torch.bfloat16)
    routing = layer.router(x, layer.experts.keys)
    assert routing.scores.dtype == torch.float32
    assert routing.gates is None or routing.gates.dtype == torch.float32
