"""Switch (methods S1-S3), and its capacity."""

import math

import pytest
import torch
import torch.nn.functional as F

from megatron_sffn.nn.layer import SparseFFN
from megatron_sffn.nn.routers import ROUTERS
from megatron_sffn.nn.routers.switch import SwitchConfig, within_capacity
from megatron_sffn.ops import block_ffn, route_topk
from tests.nn.routers.conftest import D, transformer
from tests.support import router_cases
from tests.support.ranks import run_ranks

T, B = 24, 6
ONE_ACTIVE = {"block_size": 8, "expansion": B}  # K = 1
TIGHT = {"moe_expert_capacity_factor": 0.5}


def test_s1_the_output_is_the_probability_times_the_block(build) -> None:
    torch.manual_seed(0)
    router = build(SwitchConfig(), **ONE_ACTIVE)
    x = torch.randn(T, D).double()
    keys, values = torch.randn(B, 8, D).double(), torch.randn(B, 8, D).double()
    routing = router(x, keys)
    y = block_ffn(x, keys, values, routing.block_ids, routing.gates)
    p = (x @ router.weight.T).softmax(1)
    for t in range(T):
        e = int(p[t].argmax())
        expected = p[t, e] * (F.gelu(x[t] @ keys[e].T) @ values[e])
        torch.testing.assert_close(y[t], expected, rtol=1e-10, atol=1e-12)
    y.sum().backward()
    assert router.weight.grad.abs().sum() > 0, "the gate learns through p"


def test_s1_probabilities_are_not_renormalised_over_the_chosen(build) -> None:
    torch.manual_seed(0)
    router = build(SwitchConfig())
    x = torch.randn(T, D).double()
    routing = router(x, torch.zeros(12, 2, D))
    p = (x @ router.weight.T).softmax(1)
    expected = p.gather(1, routing.block_ids)
    torch.testing.assert_close(routing.gates, expected, rtol=1e-10, atol=1e-12)
    assert torch.equal(routing.block_ids, route_topk(p, 4))
    assert (routing.gates.sum(1) < 0.99).all()


def test_small_sums_of_gates_are_noted_with_the_remedy() -> None:
    several = transformer(SwitchConfig()).sffn  # 4 of 12 blocks
    text = SwitchConfig().remark(several)
    assert text is not None and "add up to about 0.33 at first" in text
    assert text.endswith("with --sffn-gate softmax-chosen they add up to 1")
    single = transformer(SwitchConfig(), **ONE_ACTIVE).sffn  # as its paper has it
    assert SwitchConfig().remark(single) is None
    for config in (SwitchConfig(gate="softmax-chosen"), SwitchConfig(gate="sigmoid")):
        assert config.remark(several) is None
    assert ROUTERS["softmax-before"]().remark(several) is not None
    assert all(ROUTERS[name]().remark(several) is None for name in ("pkm", "rand-hash", "avg-k"))


@pytest.mark.parametrize("sequences", [1, 4])
@pytest.mark.parametrize("kind", ["aux_loss", "seq_aux_loss", "global_aux_loss"])
@pytest.mark.parametrize(("collapsed", "expected"), [(False, 1.0), (True, float(B))])
def test_s2_the_loss_is_1_when_even_and_b_when_collapsed(
    build, monkeypatch, collapsed: bool, expected: float, kind: str, sequences: int
) -> None:
    router = build(
        SwitchConfig(), **ONE_ACTIVE, moe_router_load_balancing_type=kind, moe_aux_loss_coeff=0.01
    )
    logits = torch.zeros(T, B)
    # Every sequence of T / sequences = 6 tokens has each block once, or one block alone.
    target = torch.zeros(T, dtype=torch.long) if collapsed else torch.arange(T) // sequences % B
    # Sharp for the collapse; for the even load a tiny lead decides the choice and leaves P even.
    logits[torch.arange(T), target] = 1e4 if collapsed else 1e-6
    monkeypatch.setattr(router, "score", lambda x, queries, keys: logits)
    router(torch.zeros(T, D).double(), torch.zeros(B, 8, D), None, sequences)
    (loss,) = router.balance.take_values().values()
    assert float(loss) == pytest.approx(expected, rel=1e-4)


def test_s2_only_the_sequence_loss_detects_a_collapse_within_each_sequence(
    build, monkeypatch
) -> None:
    # Each of 6 sequences has its own block: even over the microbatch, collapsed within a sequence.
    logits = torch.zeros(T, B)
    logits[torch.arange(T), torch.arange(T) % B] = 1e4
    for kind, expected in (("aux_loss", 1.0), ("seq_aux_loss", float(B))):
        balance = {"moe_router_load_balancing_type": kind, "moe_aux_loss_coeff": 0.01}
        router = build(SwitchConfig(), **ONE_ACTIVE, **balance)
        monkeypatch.setattr(router, "score", lambda x, queries, keys: logits)
        router(torch.zeros(T, D).double(), torch.zeros(B, 8, D), None, B)
        (loss,) = router.balance.take_values().values()
        assert float(loss) == pytest.approx(expected, rel=1e-4), kind


def test_s2_the_gradient_passes_through_p_alone(build, monkeypatch) -> None:
    torch.manual_seed(0)
    router = build(
        SwitchConfig(),
        **ONE_ACTIVE,
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=0.01,
    )
    logits = torch.randn(T, B, dtype=torch.float64, requires_grad=True)
    monkeypatch.setattr(router, "score", lambda x, queries, keys: logits)
    routing = router(torch.zeros(T, D).double(), torch.zeros(B, 8, D))
    routing.queries.sum().backward()
    frequencies = torch.bincount(routing.block_ids.flatten(), minlength=B) / T
    formula = logits.detach().clone().requires_grad_()
    loss = 0.01 * B * (formula.softmax(1).mean(0) * frequencies).sum()
    loss.backward()
    # Shares are counted in fp32.
    torch.testing.assert_close(logits.grad, formula.grad, rtol=1e-6, atol=1e-12)


def test_s3_the_gate_is_fp32_for_half_precision_tokens(build) -> None:
    router = build(SwitchConfig(), params_dtype=torch.bfloat16)
    x = torch.randn(T, D, dtype=torch.bfloat16)
    routing = router(x, torch.zeros(12, 2, D))
    assert routing.gates.dtype == torch.float32
    p = (x.float() @ router.weight.float().T).softmax(1)
    torch.testing.assert_close(routing.gates, p.gather(1, routing.block_ids))


def fits_by_hand(
    ids: torch.Tensor, priority: torch.Tensor | None, capacity: int
) -> list[list[bool]]:
    """A queue per block, served in the order of priority, then of tokens."""
    pairs = [(t, k) for t in range(len(ids)) for k in range(ids.shape[1])]
    if priority is not None:
        pairs.sort(key=lambda pair: -float(priority[pair]))  # stable
    free_places = dict.fromkeys(range(int(ids.max()) + 1), capacity)
    fits = [[False] * ids.shape[1] for _ in ids]
    for t, k in pairs:
        block = int(ids[t, k])
        if block >= 0 and free_places[block] > 0:
            free_places[block] -= 1
            fits[t][k] = True
    return fits


@pytest.mark.parametrize("capacity", [0, 1, 3, 100])
@pytest.mark.parametrize("levels", [0, 1, 3, 10**6])
@pytest.mark.parametrize("dropped", [False, True])
def test_the_capacity_is_that_of_a_queue_per_block(
    capacity: int, levels: int, dropped: bool
) -> None:
    # `levels` is the number of priorities, 0 for the order of tokens; few levels give many ties.
    torch.manual_seed(capacity + levels)
    ids = torch.rand(40, 7).topk(3, dim=1).indices
    if dropped:
        ids[torch.rand(ids.shape) < 0.3] = -1
    priority = torch.randint(levels, ids.shape).double() if levels else None
    actual = within_capacity(ids, priority, capacity)
    assert actual.tolist() == fits_by_hand(ids, priority, capacity)


def test_the_capacity_accepts_no_tokens_and_no_choices() -> None:
    assert within_capacity(torch.zeros(0, 2, dtype=torch.long), None, 3).shape == (0, 2)
    assert not within_capacity(torch.full((4, 2), -1), None, 3).any()


@pytest.mark.parametrize("policy", ["probs", "position"])
def test_a_block_over_capacity_adds_exactly_nothing(one_rank: None, policy: str) -> None:
    torch.manual_seed(3)
    config = transformer(SwitchConfig(), **TIGHT, moe_token_drop_policy=policy)
    layer = SparseFFN(config, layer_number=1)
    layer.router.weight.data.normal_()
    hidden = torch.randn(10, 2, D).double()
    x = hidden.flatten(0, 1)
    routings = []
    layer.trained.register_forward_pre_hook(lambda module, args: routings.append(args[0]))
    y = layer(hidden)[0].flatten(0, 1)
    p = (x @ layer.router.weight.detach().T).softmax(1)
    ids = route_topk(p, 4)
    capacity = math.ceil(0.5 * 20 * 4 / 12)
    assert capacity == 4
    fits = fits_by_hand(ids, p.gather(1, ids) if policy == "probs" else None, capacity)
    expected = ids.masked_fill(~torch.tensor(fits), -1)
    assert torch.equal(routings[0].block_ids, expected)
    assert 0 < (expected < 0).sum() < expected.numel()
    mask = torch.zeros(20, 13, dtype=torch.float64).scatter(1, expected + 1, 1.0)[:, 1:]
    keys, values = layer.experts()
    up = F.gelu(torch.einsum("td,bgd->tbg", x, keys))
    formula = torch.einsum("tbg,bgd->td", up * (mask * p)[:, :, None], values)
    torch.testing.assert_close(y, formula, rtol=1e-10, atol=1e-12)
    has_no_block = (expected < 0).all(dim=1)
    assert (y[has_no_block] == 0).all()


def test_a_token_without_any_block_gets_exactly_zero(one_rank: None) -> None:
    config = transformer(SwitchConfig(), **ONE_ACTIVE, **TIGHT, moe_token_drop_policy="position")
    layer = SparseFFN(config, layer_number=1)
    hidden = torch.randn(1, 1, D).double().expand(12, 2, D)  # all to one block, of 2 tokens
    y = layer(hidden)[0].flatten(0, 1)
    assert (y[:2] != 0).any(dim=1).all()
    assert (y[2:] == 0).all()


@pytest.mark.parametrize("gate", ["none", "sigmoid", "softmax"])
def test_a_capacity_that_fits_all_tokens_changes_nothing(build, gate: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(T, D).double()
    loss = {"moe_z_loss_coeff": 1e-3}  # without a gate nothing else trains the router
    plain = build(SwitchConfig(gate=gate), **loss)(x, torch.zeros(12, 2, D))
    # All T tokens may choose one block: C·T·K/B >= T. A negative capacity is Megatron's "no limit".
    for factor in (3.0, -1.0):
        capacity = {"moe_expert_capacity_factor": factor, "moe_token_drop_policy": "probs", **loss}
        routing = build(SwitchConfig(gate=gate), **capacity)(x, torch.zeros(12, 2, D))
        assert torch.equal(routing.block_ids, plain.block_ids)
        assert routing.may_be_empty == (factor > 0)


def ids_within_capacity(policy: str) -> torch.Tensor:
    """The block ids of this tensor-parallel rank's tokens that fit the capacity."""
    flags = (
        ("moe_expert_capacity_factor", 0.5),
        ("moe_token_drop_policy", policy),
        ("moe_router_load_balancing_type", "none"),
    )
    layer = router_cases.build(router_cases.Case(router="switch", megatron=flags))
    hidden, _, _ = router_cases.inputs()
    world = torch.distributed.group.WORLD
    local_hidden = hidden.chunk(world.size())[world.rank()]
    return layer.router(local_hidden.flatten(0, 1), layer.experts.keys).block_ids


@pytest.mark.parametrize("policy", ["probs", "position"])
def test_tensor_parallel_ranks_share_the_capacity_of_a_microbatch(policy: str) -> None:
    (expected,) = run_ranks(1, ids_within_capacity, policy)
    assert 0 < (expected < 0).sum() < expected.numel()
    rank_ids = run_ranks(2, ids_within_capacity, policy, tensor_model_parallel_size=2)
    assert torch.equal(torch.cat(rank_ids), expected)
