"""`benchmarks.plan_check` runs trainings and the planner on this machine."""

from __future__ import annotations

import pytest

from benchmarks import plan_check
from benchmarks.plan_check import Case, Rates
from megatron_sffn.utils.errors import ConfigError

# Of Python 3.13's argparse, for a flag of Megatron's.
pytestmark = pytest.mark.filterwarnings("ignore:'type' is deprecated:DeprecationWarning")


def test_steps_are_foreseen_from_the_rates_of_a_rank() -> None:
    case, rates = (
        Case(model="Avg-K", ranks=2, sizes=(1, 1, 2)),
        Rates(flops=1e11, memory=5e10, link=1e9),
    )
    expected = plan_check.plan(case, rates, ratio=0.7)
    slower = Rates(flops=1e11, memory=5e10, link=1e8)
    assert 0 < expected < plan_check.plan(case, slower, ratio=0.7)
    assert expected < plan_check.plan(case, rates, ratio=1.4)


@pytest.mark.slow
def test_a_run_on_two_ranks_is_measured_and_foreseen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(plan_check.LAYOUTS, 2, ((1, 1, 2),))
    assert plan_check.main(["--ranks", "2", "--train-iters", "2"]) == 0
    _, line, *_ = capsys.readouterr().out.splitlines()
    name, *sizes, measured, foreseen, error = line.split()
    assert (name, sizes) == ("Avg-K", ["2", "1", "1", "2"])
    assert float(measured) > 0 and float(foreseen) > 0 and error.endswith("%")


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--ranks 3", "--ranks 3 has no layouts here; choose of 1, 2, 4"),
        ("--train-iters 0", "--train-iters 0 is less than 1"),
    ],
)
def test_bad_input_is_refused(flags: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        plan_check.parse_arguments(flags.split())
