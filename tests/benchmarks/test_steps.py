"""`benchmarks.steps` measures real runs and prints tables of ratios."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import steps
from benchmarks.steps import Row, Step
from megatron_sffn.utils.errors import ConfigError

TOY = "--tokens 256 --num-layers 1 --hidden-size 32 --train-iters 2 --block-sizes 64 16"


def make_args(flags: str = "") -> steps.argparse.Namespace:
    return steps.parse_arguments(f"{TOY} --expansion 4 --expansions 2 4 {flags}".split())


@pytest.mark.parametrize("backend", ["ours", "megatron"])
def test_a_step_is_measured_in_a_real_run(backend: str) -> None:
    step = Step(backend=backend, block_size=16, expansion=2, tokens=256)
    assert 0 < steps.milliseconds(step, make_args()) < 60_000


def test_a_failing_run_is_reported_with_its_error() -> None:
    step = Step(backend="ours", block_size=48, expansion=2, tokens=256)
    with pytest.raises(ConfigError, match="--sffn-block-size 48"):
        steps.milliseconds(step, make_args())


def test_tables_and_rows_show_the_ratios(tmp_path: Path) -> None:
    args = make_args(f"--plot {tmp_path / 'steps.png'}")
    runs = steps.steps_of(args)
    # The dense FFN with T and 2T tokens; ours and Megatron's with E = 4; ours with E = 2, and with
    # E = 4 and 2T.
    assert len(runs) == len(set(runs)) == 2 + 2 * 2 + 2 * 2
    milliseconds = {run: 100.0 if run.backend == "dense" else 10.0 * run.block_size for run in runs}
    milliseconds[Step(backend="megatron", block_size=64, expansion=4, tokens=256)] = 960.0
    milliseconds[Step(backend="ours", block_size=16, expansion=2, tokens=256)] = 125.0
    lines = steps.comparison(milliseconds, args).splitlines()
    assert lines[2].split() == ["64", "2", "8", "6.40", "9.60", "1.50"]
    lines = steps.growth(milliseconds, args).splitlines()
    assert lines[-1].split() == ["16", "1.25", "1.60", "1.60"]
    steps.plot(milliseconds, args)
    assert (tmp_path / "steps.png").read_bytes().startswith(b"\x89PNG")
    row = steps.row_of(runs[0], 2.5, args, dict.fromkeys(list(Row.__annotations__)[:5], "x"))
    assert (row.backend, row.active_cells, row.ms) == ("dense", 128, 2.5)


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--tokens 300", "--tokens 300 is not a multiple of 256"),
        ("--block-sizes 48", "--block-sizes 48 does not divide the 128 active cells"),
        ("--rounds 0", "--rounds 0 is less than 1"),
        ("--output /nowhere/steps.csv", "/nowhere"),
        ("--plot steps.pdf", "--plot steps.pdf"),
    ],
)
def test_bad_input_is_refused(flags: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_args(flags)
