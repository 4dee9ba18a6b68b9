"""The benchmark of a layer with given routing at toy size: lines, rows, and bad input."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.agreement import DisagreementError
from benchmarks.blocks import layers, timing
from benchmarks.blocks import run as blocks
from benchmarks.blocks.problem import Problem, disagreement, reference
from benchmarks.blocks.table import Row
from benchmarks.machine import Platform
from benchmarks.rows import columns
from megatron_sffn.ops.activation import Activation
from megatron_sffn.utils.errors import ConfigError
from tests.support.paths import ROOT

TOY_FLAGS = (
    "--block-sizes 16 8 --expansions 2 --hidden-size 16 --active-cells 32 --tokens 24 --repeats 2 "
    "--no-output"
)
PEERS = ["Megatron SequentialMLP", "transformers grouped_mm", "torch _grouped_mm"]


def run(arguments: str) -> int:
    """Run `blocks.main` in this process."""
    return blocks.run(blocks.parse_arguments(arguments.split()), Platform.here())


def toy_problem(**changes) -> Problem:
    numbers = {
        "tokens": 12,
        "hidden_size": 16,
        "active_cells": 16,
        "block_size": 8,
        "expansion": 3,
        "activation": Activation.GELU,
        "dtype": torch.float32,
        "gated": True,
        "device": "cpu",
    }
    return Problem.draw(**{**numbers, **changes})


@pytest.mark.usefixtures("one_rank")
def test_every_size_has_a_line_and_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, chart = tmp_path / "rows.csv", tmp_path / "ratios.png"
    contenders = ["ours", "ours torch", *PEERS]
    flags = f"{TOY_FLAGS} --backends auto torch --output {output} --plot {chart}"
    assert run(flags) == run(f"{flags} --block-sizes 8") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("forward")]
    line_cells = [line.replace("forward + backward", "both").split() for line in lines]
    sizes = [(pass_, g, "2", "24") for pass_ in ("forward", "both") for g in ("16", "8")]
    assert [tuple(cells[:4]) for cells in line_cells] == [*sizes, sizes[1], sizes[3]]
    # Every line has the dense FFN's milliseconds and a ratio of every contender.
    assert all(len(cells) == 5 + len(contenders) and "-" not in cells for cells in line_cells)
    with output.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 2 * (1 + len(contenders))
    assert {row["contender"] for row in rows} == {"dense", *contenders}
    for row in rows:
        assert list(row) == columns(Row)
        assert {"pass", "date", "commit", "spread"} < row.keys()
        optional = ("transformer_engine", "triton", "commit")
        assert all(value for name, value in row.items() if name not in optional), row
        assert float(row["ms"]) > 0
        assert row["contender"] != "dense" or float(row["ratio"]) == 1
    assert chart.read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("gated", [False, True])
def test_all_contenders_compute_the_same_layer(activation: Activation, gated: bool) -> None:
    problem = toy_problem(activation=activation, gated=gated)
    expected = reference(problem)
    assert expected.keys() == {"y", "x", "keys", "values"} | ({"gates"} if gated else set())
    modules = [layers.BlockFFN(problem, "auto")]
    modules += [build(problem) for build in layers.peers().values()]
    assert len(modules) == 4
    for module in modules:
        assert blocks.difference(module, problem, expected) < 1e-5, module
    # The dense FFN equals one block that all tokens share.
    dense_problem = toy_problem(activation=activation, gated=False, expansion=1)
    dense = layers.Dense(dense_problem)(dense_problem.x)
    torch.testing.assert_close(dense, layers.BlockFFN(dense_problem, "naive")(dense_problem.x))


@pytest.mark.usefixtures("one_rank")
def test_a_wrong_peer_has_no_ratio(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class WrongPeer(layers.GroupedMM):
        def gradients(self):
            return {**super().gradients(), "keys": self.keys.grad * 1.01}

    class BrokenPeer(layers.GroupedMM):
        def forward(self, x):
            raise NotImplementedError("not on\nthis device")

    monkeypatch.setattr(layers, "peers", lambda: {"a wrong": WrongPeer, "a broken": BrokenPeer})
    assert run(TOY_FLAGS) == 0
    stdout = capsys.readouterr().out
    lines = [line.split() for line in stdout.splitlines() if line.startswith("forward")]
    assert len(lines) == 4
    assert all(cells[-2:] == ["-", "-"] and cells[-3] != "-" for cells in lines)
    sizes = "g = 16 E = 2, g = 8 E = 2"
    assert f"- a broken, {sizes}: NotImplementedError: not on this device\n" in stdout
    assert f"- a wrong, {sizes}: wrong: it differs from the oracle by 1.0e-02 of the norm" in stdout


@pytest.mark.usefixtures("one_rank")
def test_no_ratio_is_printed_if_our_layer_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    original = layers.BlockFFN.forward
    monkeypatch.setattr(
        layers.BlockFFN,
        "forward",
        lambda self, x: original(self, x).index_fill(0, last_index(x), 0),
    )
    output = tmp_path / "rows.csv"
    with pytest.raises(
        DisagreementError, match=r"ours torch is wrong at g = 16, E = 2: it differs"
    ):
        run(f"{TOY_FLAGS} --backends torch --output {output}")
    assert not capsys.readouterr().out
    assert not output.exists()

    def disagree() -> int:
        raise DisagreementError("ours is wrong")

    monkeypatch.setattr(blocks, "main", disagree)
    assert blocks.command() == 1
    assert capsys.readouterr().err == "error: ours is wrong\n"


def last_index(x: torch.Tensor) -> torch.Tensor:
    return torch.tensor([len(x) - 1])


def test_a_nan_counts_as_infinite_disagreement() -> None:
    expected = {"y": torch.ones(2, dtype=torch.float64)}
    assert disagreement({"y": torch.tensor([1.0, torch.nan])}, expected) == torch.inf


def test_the_budget_refuses_steps_that_are_too_long_or_too_large(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    coarse, fine = toy_problem(), toy_problem(block_size=2)
    budget = timing.Budget(seconds=10)
    assert budget.refusal("peer", fine) is None
    assert budget.note("peer", coarse, 3.0) is None
    # Four times the pairs are expected to take 12 seconds.
    assert budget.refusal("peer", fine) == "a step would take longer than --budget 10 (seconds)"
    assert budget.refusal("another", fine) is None
    assert budget.note("another", coarse, 11.0) == budget.too_long
    monkeypatch.setattr(timing, "free_memory", lambda device: 1000)
    assert budget.refusal("third", coarse) == (
        "its copies of tokens would need more memory than is free"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--block-sizes 48", r"--block-sizes 48 does not divide .* 2048; .* such as 16"),
        ("--block-sizes 64 0", r"--block-sizes 0 is less than 1; give at least 1"),
        ("--expansions 0", r"--expansions 0 is less than 1"),
        ("--tokens 0", r"--tokens 0 is less than 1"),
        ("--threads 0", r"--threads 0 is less than 1"),
        ("--budget 0", r"--budget 0 is no time; give seconds above 0"),
        ("--budget nan", r"--budget nan is no time"),
        ("--output .", r"--output \. is a folder"),
        (f"--output {__file__}", r"has other columns; give another path"),
        ("--plot ratios.jpg", r"--plot ratios\.jpg does not end in \.png"),
        ("--plot no/ratios.png", r"--plot no/ratios\.png is in no folder; make no first"),
    ],
)
def test_bad_flags_are_refused(arguments: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        blocks.main(arguments.split())


def test_a_missing_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Platform(device="CPU", backend="gloo", devices=None)
    monkeypatch.setattr(Platform, "here", lambda: host)
    with pytest.raises(ConfigError, match=r"--device cuda: torch finds no CUDA device here; run"):
        blocks.main([*TOY_FLAGS.split(), "--device", "cuda"])


def test_the_command_prints_its_settings() -> None:
    command = [sys.executable, "-m", "benchmarks.blocks", *TOY_FLAGS.split(), "--dtype", "bf16"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "D = 16, k = 32, bf16, gelu, without gates" in process.stdout
