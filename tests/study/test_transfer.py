"""Learning rates that are derived from those of another study."""

from __future__ import annotations

from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megatron_sffn.study.running.foresee import foresee, valid_forecasts
from megatron_sffn.study.running.study_file import read_study
from megatron_sffn.study.running.transfer import RESULTS, Training, scaled_rate
from tests.study.conftest import WriteStudy

# Of Python 3.13's argparse, for a flag of Megatron's.
pytestmark = pytest.mark.filterwarnings("ignore:'type' is deprecated:DeprecationWarning")

HIDDEN, TOKENS, ITERATIONS = 32, 4096, 8
"""Of the study that has tuned its rates; its batch is that of the runs of these tests."""


def write_tuned(folder: Path) -> None:
    """Write the results of a study: router, block size, rate, source of the rate, and loss."""
    rows = [
        ("dense", None, 1e-3, "fitted", 3.0),
        ("avg-k", 4, 2e-3, "fitted", 3.0),
        ("avg-k", 32, 4e-3, "fitted", 3.0),
        ("avg-k", 32, 4e-3, "fitted", 3.2),
        ("avg-k", 32, 9e-3, "ladder", 2.0),
        ("switch", 8, 5e-3, "given", 3.1),
        ("switch", 8, 6e-3, "given", 3.0),
    ]
    records = [
        {
            "point": f"{router}-{block_size}",
            "router": router,
            "block_size": block_size,
            "expansion": 4,
            "hidden_size": HIDDEN,
            "lr": rate,
            "rate_source": source,
            "validation_loss": loss,
            "tokens": TOKENS,
            "iterations": ITERATIONS,
        }
        for router, block_size, rate, source, loss in rows
    ]
    folder.mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), folder / RESULTS)


def test_a_run_takes_the_rate_of_the_nearest_block_size_of_its_router(
    write_study: WriteStudy, tmp_path: Path
) -> None:
    write_tuned(tmp_path / "tuned")
    path = write_study(
        [
            {"sffn-router": "dense"},
            {"sffn-router": "avg-k", "sffn-block-size": [1, 4, 16]},
            {"sffn-router": "switch", "sffn-block-size": 16},
        ],
        each={"lr": "transferred"},
        flags=f"--train-iters {ITERATIONS}",
        transfer=str(tmp_path / "tuned"),
    )
    forecasts = valid_forecasts(read_study(path))
    assert {forecast.tokens for forecast in forecasts} == {TOKENS}
    rates = {forecast.run.name: float(forecast.run.flags[-1]) for forecast in forecasts}
    assert rates == {
        "dense-lrtransferred": 1e-3,
        "avg-k-g1-lrtransferred": 2e-3,
        "avg-k-g4-lrtransferred": 2e-3,
        "avg-k-g16-lrtransferred": 4e-3,  # g 32 is nearer than g 4; rungs of a ladder do not count
        "switch-g16-lrtransferred": 6e-3,  # the better of two
    }


def test_rates_fall_with_width_and_tokens_and_rise_with_the_batch() -> None:
    tuned = Training(hidden_size=64, tokens=1000, batch_tokens=10)
    assert scaled_rate(1e-3, tuned, tuned) == pytest.approx(1e-3)
    wide = Training(hidden_size=128, tokens=1000, batch_tokens=10)
    longer = Training(hidden_size=64, tokens=4000, batch_tokens=10)
    large_batch = Training(hidden_size=64, tokens=1000, batch_tokens=40)
    assert scaled_rate(1e-3, tuned, wide) == pytest.approx(1e-3 * 2**-0.3678)
    assert scaled_rate(1e-3, tuned, longer) == pytest.approx(1e-3 * 4**-0.2813)
    assert scaled_rate(1e-3, tuned, large_batch) == pytest.approx(2e-3)


def test_a_study_without_results_or_without_the_router_is_named(
    write_study: WriteStudy, tmp_path: Path
) -> None:
    path = write_study(
        [{"sffn-router": "rand-hash", "sffn-block-size": 8}],
        each={"lr": "transferred"},
        flags="--train-iters 2",
        transfer=str(tmp_path / "tuned"),
    )
    (forecast,) = foresee(read_study(path))
    assert "has no results.parquet" in str(forecast.reason)
    write_tuned(tmp_path / "tuned")
    (forecast,) = foresee(read_study(path))
    assert "no learning rate of the router rand-hash; it has avg-k, dense" in str(forecast.reason)
