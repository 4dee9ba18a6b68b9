"""The benchmark of a layer on several ranks at toy size: rows, bytes, and bad input."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.machine import Platform
from benchmarks.parallel import contenders
from benchmarks.parallel import run as parallel
from benchmarks.parallel.table import COLUMNS, Row
from benchmarks.rows import read
from megatron_sffn.utils.errors import ConfigError
from tests.support.paths import ROOT

TOY = (
    "--ranks 2 --hidden-size 16 --active-cells 32 --expansion 4 --tokens 64 --block-sizes 32 8 "
    "--repeats 2"
)


@pytest.fixture
def rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> list[dict[str, str]]:
    """The CSV rows of two toy runs, the second with one block size."""
    path = tmp_path / "rows.csv"
    for arguments in (TOY, f"{TOY} --block-sizes 8"):
        results = ["--output", str(path), "--plot", str(path.with_suffix(".png"))]
        assert parallel.main([*arguments.split(), *results]) == 0
    printed = capsys.readouterr().out
    assert printed.count("2 ranks over gloo") == 2
    assert "D = 16, k = 32, E = 4" in printed
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_have_ratios_and_the_bytes_of_the_closed_form(
    rows: list[dict[str, str]], tmp_path: Path
) -> None:
    read_rows = read(tmp_path / "rows.csv", Row)
    assert [str(row.block_size) for row in read_rows] == [row["block_size"] for row in rows]
    assert [str(row.chosen) for row in read_rows] == [row["chosen"] for row in rows]
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")
    cases = [(row["block_size"], row["dispatcher"]) for row in rows]
    kinds = [(size, dispatcher) for size in ("32", "8") for dispatcher in ("alltoall", "allgather")]
    assert cases == [*kinds, *kinds[2:]]
    for row in rows:
        assert list(row) == COLUMNS
        ratios = {name: float(row[name]) for name in COLUMNS if "_over_" in name}
        assert len(ratios) == 7
        assert all(ratio > 0 for ratio in ratios.values()), ratios
        assert int(row["repeats"]) == 2
        our_bytes, megatron_bytes = float(row["ours_bytes"]), float(row["megatron_bytes"])
        if row["dispatcher"] == "allgather":
            # Both send D = 16 both ways; ours also K ids of 2 bytes and gates, Megatron a mask and
            # probabilities of all B blocks.
            active, blocks = int(row["active_blocks"]), int(row["blocks"])
            assert our_bytes == float(row["ours_closed_form"]) == 2 * 16 * 4 + active * (2 + 4)
            assert megatron_bytes == float(row["megatron_closed_form"]) == 2 * 16 * 4 + blocks * 5
        else:
            # Routing is nearly uniform, and the closed form leaves out Megatron's probabilities and
            # counts.
            assert our_bytes == pytest.approx(float(row["ours_closed_form"]), rel=0.2)
            assert megatron_bytes == pytest.approx(float(row["megatron_closed_form"]), rel=0.2)
    for size in ("32", "8"):
        chosen = [row["chosen"] for row in rows if row["block_size"] == size]
        assert chosen.count("True") == len(chosen) / 2


def test_our_layer_reports_the_bytes_that_the_collectives_send() -> None:
    args = parallel.parse_arguments(TOY.split())
    for results_of_ranks in parallel.measure(2, args, Platform.here()):
        for measured in results_of_ranks:
            gathered, exact = (
                contenders.name_of("ours", dispatcher) for dispatcher in ("allgather", "alltoall")
            )
            assert measured.reported[gathered] == measured.sent[gathered]
            # The report leaves out the exchange of counts, which are two int64.
            assert measured.reported[exact] + 16 == measured.sent[exact]


def test_no_ratio_is_printed_if_the_layers_disagree(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = contenders.megatron_layer

    def wrong_layer(config, our_layer):
        layer = original(config, our_layer)
        layer.experts.local_experts[0].linear_fc1.weight.data *= 1.01
        return layer

    monkeypatch.setattr(contenders, "megatron_layer", wrong_layer)
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
        ("--plot rows.svg", r"--plot rows\.svg does not end in \.png; give a name that does"),
        ("--output no/rows.csv", r"--output no/rows\.csv is in no folder; make no first"),
        (f"--output {__file__}", r"has other columns; give another path"),
    ],
)
def test_bad_flags_are_refused(arguments: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parallel.main(arguments.split())


def test_too_few_gpus_are_refused() -> None:
    two_gpus = Platform(device="H", backend="nccl", devices=2)
    assert two_gpus.start_method == "spawn"
    parallel.check_devices(2, two_gpus)
    with pytest.raises(ConfigError, match=r"--ranks 4 is more than this machine's 2 GPUs; give"):
        parallel.check_devices(4, two_gpus)


def test_bad_flags_end_the_command_with_one_sentence_and_exit_code_2() -> None:
    command = [sys.executable, "-m", "benchmarks.parallel", "--block-sizes", "48"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr.startswith("error: --block-sizes 48 does not divide")
    assert process.stderr.count("\n") == 1
