"""The effective speedup in cases whose answer is known."""

from __future__ import annotations

import pytest

from megatron_sffn.scaling.speedup import (
    PUBLISHED,
    BaselineLaw,
    Trained,
    baseline_law,
    effective_speedup,
)

BASELINE = Trained(loss=3.0, compute=1e18, seconds=100.0)


def test_the_baseline_has_a_speedup_of_1() -> None:
    speedup = effective_speedup(BASELINE, BASELINE, PUBLISHED)
    assert speedup is not None
    assert speedup.compute == speedup.time == pytest.approx(1)


def test_half_the_compute_at_equal_loss_and_rate_is_a_speedup_of_2() -> None:
    half = Trained(loss=3.0, compute=5e17, seconds=50.0)
    speedup = effective_speedup(half, BASELINE, PUBLISHED)
    assert speedup is not None
    assert speedup.compute == speedup.time == pytest.approx(2)


def test_a_slower_model_loses_in_seconds_what_it_gains_in_compute() -> None:
    slow = Trained(loss=3.0, compute=5e17, seconds=100.0)
    speedup = effective_speedup(slow, BASELINE, PUBLISHED)
    assert speedup is not None
    assert (speedup.compute, speedup.time) == (pytest.approx(2), pytest.approx(1))


def test_three_budgets_fix_the_law_and_two_leave_the_published_one() -> None:
    dense = [Trained(loss=1.0 + 20 * c**-0.06, compute=c) for c in (1e16, 1e17, 1e18, 1e19)]
    law = baseline_law(dense)
    assert law.asymptote == pytest.approx(1.0, abs=0.05)
    assert law.exponent == pytest.approx(0.06, abs=0.003)
    assert "4 budgets of this study" in law.source
    assert baseline_law(dense[:2]) is PUBLISHED
    needed = law.compute_for(dense[-1].loss, dense[1])
    assert needed == pytest.approx(1e19, rel=0.05)


def test_a_loss_below_the_asymptote_has_no_speedup() -> None:
    law = BaselineLaw(asymptote=2.5, exponent=0.1, source="test")
    assert effective_speedup(Trained(loss=2.4, compute=1e18), BASELINE, law) is None
    without_time = effective_speedup(Trained(loss=2.9, compute=1e18), BASELINE, law)
    assert without_time is not None and without_time.time is None and without_time.compute > 1
