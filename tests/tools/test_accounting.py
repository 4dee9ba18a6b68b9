"""The tool prints the costs of configurations."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_sffn.nn.routers import ROUTERS
from megatron_sffn.utils.errors import ConfigError
from tools import accounting

# Megatron itself causes this warning.
pytestmark = pytest.mark.filterwarnings("ignore:'type' is deprecated:DeprecationWarning")

PAPER = (
    "--num-layers 24 --hidden-size 1024 --num-attention-heads 16 --seq-length 2048 "
    "--max-position-embeddings 2048 --padded-vocab-size 50257 --sffn-layers every:6 "
)


TABLE = """
                total   active  forward  training      over   state  activations  sent a token
router     g   params   params    FLOPs     FLOPs     dense  a rank       a rank     and layer
dense         355.9 M  355.9 M  908.2 M     2.7 G      +0 %  2.1 GB      10.2 GB             -
avg-k   4096        -        -        -         -         -       -            -             -
avg-k     64  859.2 M  355.9 M  916.6 M     2.7 G  +0.924 %  2.0 GB      10.1 GB      167.0 kB
pkm     4096        -        -        -         -         -       -            -             -
pkm       64        -        -        -         -         -       -            -             -
"""


def output_of(capsys: pytest.CaptureFixture[str], flags: str) -> str:
    """Standard output of the tool."""
    capsys.readouterr()
    assert accounting.main(flags.split()) == 0
    return capsys.readouterr().out


def rows_of(capsys: pytest.CaptureFixture[str], flags: str) -> list[dict[str, Any]]:
    """The rows that the tool prints as JSON."""
    rows: list[dict[str, Any]] = json.loads(output_of(capsys, f"{flags} --json"))
    return rows


def test_training_flops_are_those_of_the_papers_table(capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of(
        capsys,
        f"{PAPER} --compare-routers avg-k,switch --compare-block-sizes 4096,256,64,1 "
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    )
    assert [(row["router"], row["block_size"]) for row in rows] == [
        (router, size) for router in ("avg-k", "switch") for size in (4096, 256, 64, 1)
    ]
    zettaflops = [f"{60e9 * row['flops_training'] / 1e21:.4f}" for row in rows]
    assert zettaflops == 2 * ["0.2118", "0.2123", "0.2138", "0.3406"]


def test_the_table_shows_costs_per_rank_and_reasons_for_missing_rows(
    capsys: pytest.CaptureFixture[str],
) -> None:
    stdout = output_of(
        capsys,
        f"{PAPER} --ranks 1024 --expert-model-parallel-size 64 --bf16 --use-distributed-optimizer "
        "--compare-routers dense,avg-k,pkm --compare-block-sizes 4096,64 --device cuda",
    )
    lines = stdout.splitlines()
    assert lines[:2] == [
        "model: 24 layers of width 1024, 4 of them sparse, sequences of 2048, vocabulary 50,257",
        "ranks: 1,024 = TP 1 · PP 1 · EP 64 · ETP 1 · DP 1024; microbatch of 1, bf16, distributed "
        "optimizer, no recomputation, torch's CUDA kernels",
    ]
    # With 4096 cells per block there are 16 blocks, which EP 64 does not divide.
    assert lines[3:10] == TABLE.strip("\n").splitlines()
    assert "avg-k 4096: --expert-model-parallel-size 64 does not divide the 16 blocks" in stdout
    assert "pkm 64: --sffn-router pkm has a score for every cell" in stdout


def test_every_router_has_costs(capsys: pytest.CaptureFixture[str]) -> None:
    flags = (
        "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 16 "
        "--max-position-embeddings 16 --vocab-size 100 --sffn-active-cells 64 --ffn-hidden-size 64 "
        "--sffn-expansion 64 --sffn-block-size 1 --ranks 2 --expert-model-parallel-size 2 "
        "--disable-bias-linear"
    )
    rows = rows_of(capsys, f"{flags} --compare-routers {','.join(ROUTERS)}")
    assert [row["router"] for row in rows] == list(ROUTERS)
    for row in rows:
        assert row["reason"] is None
        assert row["parameters_total"] >= row["parameters_active"] > 0
        costs = ("weights", "gradients", "optimizer", "activations")
        assert all(row[cost] > 0 for cost in costs)
        assert row["router"] == "dense" or row["sent_per_token_and_layer"] > 0
    # A vocabulary of 100 is padded as in a run.
    assert rows[-1]["parameters_total"] > 128 * 32


def test_csv_and_json_have_the_same_rows(capsys: pytest.CaptureFixture[str]) -> None:
    flags = f"{PAPER} --compare-routers avg-k,top-k-act"
    (first, second) = csv.DictReader(io.StringIO(output_of(capsys, f"{flags} --csv")))
    (json_row, _) = rows_of(capsys, flags)
    assert first["router"] == "avg-k" and int(first["weights"]) == json_row["weights"]
    assert second["weights"] == "" and "--sffn-block-size 1" in second["reason"]


def test_plot_writes_a_picture(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "costs.png"
    output_of(
        capsys,
        f"{PAPER} --compare-routers dense,avg-k,pkm --compare-block-sizes 4096,64 --plot {path}",
    )
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--num-layers 3", "--hidden-size is missing"),
        (PAPER.replace("--padded-vocab-size 50257", ""), "--vocab-size is missing, and no token"),
        (f"{PAPER} --ranks 0", "--ranks 0 must be at least 1"),
        (f"{PAPER} --ranks many", "invalid int value: 'many'; --help lists"),
        (f"{PAPER} --ranks 6 --tensor-model-parallel-size 4", "does not divide the number of ra"),
        (f"{PAPER} --compare-routers avg-k,best", "--compare-routers best is unknown; choose fro"),
        (f"{PAPER} --compare-block-sizes 4,big", "--compare-block-sizes 4,big is not a list"),
        (f"{PAPER} --compare-block-sizes 48,80", "48 does not divide --sffn-active-cells 4096"),
        (f"{PAPER} --no-such-flag", "unrecognized arguments: --no-such-flag"),
        (f"{PAPER} --plot nowhere/costs.png", "--plot nowhere/costs.png cannot be written"),
        (f"{PAPER} --optimizer soap", "soap"),
        (
            f"{PAPER} --optimizer muon --bf16 --use-distributed-optimizer",
            "gives whole weights to ranks",
        ),
    ],
)
def test_bad_flags_are_reported_in_one_sentence(flags: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as error:
        accounting.main(flags.split())
    assert "\n" not in str(error.value)


def test_a_failure_leaves_arguments_and_environment_unchanged() -> None:
    expected = (list(sys.argv), dict(os.environ))
    with pytest.raises(ConfigError):
        accounting.main(["--num-layers", "3"])
    assert (sys.argv, dict(os.environ)) == expected


def test_the_command_reports_an_error_with_exit_code_2() -> None:
    process = subprocess.run(
        [sys.executable, "tools/accounting.py", *PAPER.split(), "--sffn-block-size", "48"],
        capture_output=True,
        text=True,
    )
    assert process.returncode == 2 and process.stdout == ""
    assert process.stderr.startswith("error: --sffn-block-size 48 does not divide")


def test_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        accounting.main(["--help"])
    stdout = capsys.readouterr().out
    assert exit_info.value.code == 0
    assert "example: which block size, which router" in stdout and "--vocab-size" in stdout
