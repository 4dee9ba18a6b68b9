"""The tool prints plans, comparisons and the check, and refuses bad input in one sentence."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from megatron_sffn.utils.errors import ConfigError
from tests.planning import runs
from tools import plan

FLAGS = f"{runs.FLAGS} --micro-batch-size 2 --expert-tensor-parallel-size 1"

# Megatron itself causes this warning.
pytestmark = pytest.mark.filterwarnings("ignore:'type' is deprecated:DeprecationWarning")


def output_of(capsys: pytest.CaptureFixture[str], flags: str) -> str:
    """Standard output of the tool."""
    capsys.readouterr()
    assert plan.main(flags.split()) == 0
    return capsys.readouterr().out


def test_the_table_has_the_best_layouts_with_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    printed = output_of(capsys, f"--gpus 8 --top 4 --price 2 --tokens 1e9 {FLAGS}")
    lines = printed.splitlines()
    assert lines[0].startswith("8 × h100, 8 per node; products at 73% of the peak; all times are")
    assert lines[2].split()[:6] == ["TP", "PP", "VP", "EP", "ETP", "MB"]
    assert "fastest of" in lines[3]
    assert all(lines[3:7])
    assert "are refused" in printed
    assert "flags of the best: " in printed


def test_a_layout_that_is_faster_but_does_not_fit_is_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    printed = output_of(capsys, f"--gpus 8 --top 1 --gpu-memory 0.2 {FLAGS}")
    assert " of 180.0 MB\n" in printed
    assert "does not fit: " in printed


def test_json_and_csv_have_the_same_records(capsys: pytest.CaptureFixture[str]) -> None:
    flags = f"--gpus 8 --top 3 --tokens 1e9 --price 3 {FLAGS}"
    records = json.loads(output_of(capsys, f"{flags} --json"))
    rows = list(csv.DictReader(io.StringIO(output_of(capsys, f"{flags} --csv"))))
    assert len(records) == len(rows) == 3
    for record, row in zip(records, rows, strict=True):
        assert float(row["step_seconds"]) == record["step_seconds"]
        hours = record["days"] * 24 * record["gpus"]
        assert record["cost"] == pytest.approx(3 * hours)
        assert record["days"] == pytest.approx(1e9 / record["tokens_per_day"])
        assert record["provenance"] == "derived"


def test_comparisons_have_a_row_for_each_number_of_gpus_and_block_size(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "cost.png"
    printed = output_of(
        capsys,
        f"--compare-gpus 1,2,12 --compare-block-sizes 1024,128 --tokens 1e9 --plot {path} {FLAGS}",
    )
    rows = [line.split()[:2] for line in printed.splitlines()[1:7]]
    assert rows == [[str(gpus), size] for size in ("1024", "128") for gpus in (1, 2, 12)]
    assert "12 GPUs, g = 128: --gpus 12 is not a multiple of --gpus-per-node 8; use 8 or 16" in (
        printed
    )
    assert path.read_bytes().startswith(b"\x89PNG")


def test_check_prints_published_and_foreseen_throughput(capsys: pytest.CaptureFixture[str]) -> None:
    printed = output_of(capsys, "--check")
    assert "Mixtral-8x22B" in printed
    assert "mean of the absolute errors: " in printed


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            "--gpus 12",
            "--gpus 12 is not a multiple of --gpus-per-node 8; use 8 or 16",
        ),
        ("--gpus 0", "--gpus 0 must be at least 1; give a positive number"),
        (
            "--efficiency 73",
            "--efficiency 73 is not above 0 and at most 1; give the achieved over the peak FLOP/s "
            "of a large dense product",
        ),
        ("--node-bandwidth 0", "--node-bandwidth 0 is not above 0; give a positive number"),
        ("--price -1", "--price -1 is not a price; give that of a GPU hour, at least 0"),
        ("--tokens 0", "--tokens 0 is not above 0; give for example 300e9"),
        ("--top 0", "--top 0 must be at least 1; give a positive number"),
        ("--plot x.png", "--plot needs a budget; give --tokens, for example 300e9"),
        (
            "--compare-gpus 8,x",
            "--compare-gpus 8,x is not a list of numbers; write for example 8,64,512",
        ),
    ],
)
def test_a_bad_number_is_one_sentence(flags: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        plan.main([*flags.split(), *FLAGS.split()])
    assert str(error.value) == sentence
