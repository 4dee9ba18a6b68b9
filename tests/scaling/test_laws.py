"""Published laws give the values that their papers and code give."""

from __future__ import annotations

import pytest

from megatron_sffn.scaling import laws


def test_ling_gives_the_leverage_of_its_check() -> None:
    leverage = laws.ling_leverage(
        expansion=1 / 0.031, block_size=2 * 1536 / 12, hidden_size=1536, compute=1e22
    )
    assert leverage == pytest.approx(7.24, abs=0.01)


def test_marin_projects_the_loss_of_its_largest_model() -> None:
    assert laws.marin_loss(compute=1e21) == pytest.approx(2.606, abs=0.001)
    small, large = (
        laws.marin_learning_rate(tokens=1e9, hidden_size=512, batch=batch) for batch in (64, 256)
    )
    assert large == pytest.approx(2 * small)


def test_krajewski_falls_with_granularity_and_its_constant_is_the_limit() -> None:
    sparse = laws.KRAJEWSKI_SPARSE
    size = {"parameters": 4.3e9, "tokens": 4.37e9}
    losses = [sparse.loss(**size, granularity=laws.granularity(512, g)) for g in (2048, 256, 32)]
    assert losses == sorted(losses, reverse=True)
    by_hand = 0.47 + (2.1 / 8**0.58 + 18.1) / 4.3e9**0.115 + 30.8 / 4.37e9**0.147
    assert losses[1] == pytest.approx(by_hand) and laws.granularity(512, 256) == 8
    assert sparse.loss(parameters=1e300, tokens=1e300) == pytest.approx(0.47)
    assert laws.KRAJEWSKI_DENSE.loss(parameters=1e9, tokens=1e10) == pytest.approx(
        0.47 + 16.3 / 1e9**0.126 + 26.7 / 1e10**0.127
    )


def test_ludziejewski_starts_at_the_dense_model_and_gains_with_experts() -> None:
    dense, sparse = (
        laws.ludziejewski_loss(expansion=experts, parameters_active=1e9, tokens=1e11)
        for experts in (1, 16)
    )
    start = 2.0732
    assert laws._expert_count(1, start, 290.4521) == pytest.approx(start)
    assert 1.3637 < sparse < dense < 3
