"""The benchmark of a layer between ranks, at toy size: its rows, its bytes, what it refuses."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.machine import Platform
from benchmarks.parallel import contenders
from benchmarks.parallel import run as parallel
from benchmarks.parallel.table import COLUMNS
from megatron_sffn.utils.errors import ConfigError
from tests.support.paths import ROOT

TOY = (
    "--ranks 2 --hidden-size 16 --active-cells 32 --expansion 4 --tokens 64 --block-sizes 32 8 "
    "--repeats 2"
)


@pytest.fixture
def rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> list[dict[str, str]]:
    """The CSV file of two toy runs, the second of one block size."""
    path = tmp_path / "rows.csv"
    for arguments in (TOY, f"{TOY} --block-sizes 8"):
        assert parallel.main([*arguments.split(), "--output", str(path)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("2 ranks over gloo") == 2
    assert "D = 16, k = 32, E = 4" in printed
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_and_bytes(rows: list[dict[str, str]]) -> None:
    found = [(row["block_size"], row["dispatcher"]) for row in rows]
    kinds = [(size, way) for size in ("32", "8") for way in ("alltoall", "allgather")]
    assert found == [*kinds, *kinds[2:]]
    for row in rows:
        assert list(row) == COLUMNS
        ratios = {name: float(row[name]) for name in COLUMNS if "_over_" in name}
        assert len(ratios) == 7
        assert all(ratio > 0 for ratio in ratios.values()), ratios
        assert int(row["repeats"]) == 2
        ours, theirs = float(row["ours_bytes"]), float(row["megatron_bytes"])
        if row["dispatcher"] == "allgather":
            # D = 16 both ways, K ids of 2 bytes and gates; or a mask and probabilities of all B.
            active, blocks = int(row["active_blocks"]), int(row["blocks"])
            assert ours == float(row["ours_closed_form"]) == 2 * 16 * 4 + active * (2 + 4)
            assert theirs == float(row["megatron_closed_form"]) == 2 * 16 * 4 + blocks * 5
        else:
            # Routing is near uniform, and Megatron's probabilities and counts are not in its form.
            assert ours == pytest.approx(float(row["ours_closed_form"]), rel=0.2)
            assert theirs == pytest.approx(float(row["megatron_closed_form"]), rel=0.2)
    for size in ("32", "8"):
        chosen = [row["chosen"] for row in rows if row["block_size"] == size]
        assert chosen.count("True") == len(chosen) / 2


def test_ours_reports_what_the_collectives_send() -> None:
    args = parallel.parse_arguments(TOY.split())
    for of_ranks in parallel.measure(2, args, Platform.here()):
        for measured in of_ranks:
            gathered, exact = (contenders.name_of("ours", way) for way in ("allgather", "alltoall"))
            assert measured.reported[gathered] == measured.sent[gathered]
            # The exchange of counts, a pair of int64, is left out of the report.
            assert measured.reported[exact] + 16 == measured.sent[exact]


def test_no_ratios_of_layers_that_disagree(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = contenders.megatron_layer

    def wrong(config, ours):
        layer = original(config, ours)
        layer.experts.local_experts[0].linear_fc1.weight.data *= 1.01
        return layer

    monkeypatch.setattr(contenders, "megatron_layer", wrong)
    monkeypatch.setattr(sys, "argv", ["parallel", *TOY.split()])
    assert parallel.command() == 1
    streams = capsys.readouterr()
    assert not streams.out
    assert "on 2 ranks at g = 32 the layers differ by" in streams.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--block-sizes 48", r"--block-sizes 48 does not divide .* 1024; .* such as 16"),
        ("--block-sizes 64 0", r"--block-sizes 0 is less than 1; give at least 1"),
        ("--hidden-size 0", r"--hidden-size 0 is less than 1"),
        ("--ranks 1", r"--ranks 1 has nothing to exchange; give at least 2"),
        ("--ranks 3", r"--ranks 3 does not divide the 4 blocks of --block-sizes 1024"),
        ("--tokens 3", r"--tokens 3 is less than --ranks 4; give at least 4"),
        ("--output .", r"--output \. is a folder"),
        ("--output no/rows.csv", r"--output no/rows\.csv is in no folder; make no first"),
        (f"--output {__file__}", r"has other columns; give another path"),
    ],
)
def test_bad_flags(arguments: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parallel.main(arguments.split())


def test_too_few_gpus() -> None:
    two = Platform(device="H", backend="nccl", devices=2)
    assert two.start_method == "spawn"
    parallel.check_devices(2, two)
    with pytest.raises(ConfigError, match=r"--ranks 4 is more than this machine's 2 GPUs; give"):
        parallel.check_devices(4, two)


def test_bad_flags_are_one_sentence_and_exit_code_2() -> None:
    command = [sys.executable, "-m", "benchmarks.parallel", "--block-sizes", "48"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --block-sizes 48 does not divide")
    assert done.stderr.count("\n") == 1
