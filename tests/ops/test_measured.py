"""The choice of `auto` on a CPU: our C++ products or plain torch, by a measurement that is kept."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from megatron_sffn.ops.block_ffn import cpu, measured, torch_backend
from megatron_sffn.ops.block_ffn.choose_backend import products_for
from megatron_sffn.ops.compiled import kernels, library_path

LARGE, SMALL = torch.zeros(2, 100, 8), torch.zeros(2, 32, 8)
NAME = f"float32 G=128 D=8 threads={torch.get_num_threads()}"


@pytest.fixture(autouse=True)
def _nothing_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernels() is None:
        pytest.skip("needs a C++ compiler")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(measured, "_ratios", {})


def set_times(monkeypatch: pytest.MonkeyPatch, loop: float, ours: float) -> list[tuple[int, int]]:
    """Replace the clock; returns the sizes that are measured from now on."""
    sizes = []

    def seconds(_: object, dtype: torch.dtype, cells: int, width: int) -> list[float]:
        sizes.append((cells, width))
        return [loop, ours]

    monkeypatch.setattr(measured, "_seconds", seconds)
    return sizes


@pytest.mark.parametrize(("loop", "chosen"), [(0.8, "torch"), (0.97, "cpu"), (1.3, "cpu")])
def test_auto_takes_torch_only_where_it_is_clearly_faster(
    monkeypatch: pytest.MonkeyPatch, loop: float, chosen: str
) -> None:
    set_times(monkeypatch, loop, 1.0)
    ours = cpu.products(torch.float32, 100)
    assert products_for("auto", LARGE) is (torch_backend if chosen == "torch" else ours)
    assert products_for("cpu", LARGE) is ours  # a name that the user gives is kept
    assert products_for("auto", SMALL) is ours


def test_a_size_is_measured_once_on_a_machine_and_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = set_times(monkeypatch, 0.5, 1.0)
    with caplog.at_level(logging.INFO):
        products_for("auto", LARGE)
        products_for("auto", torch.zeros(7, 128, 8))  # of the same powers of two
        measured._ratios.clear()  # as in a new process
        assert products_for("auto", LARGE) is torch_backend
    assert sizes == [(128, 8)]
    (line,) = [record.getMessage() for record in caplog.records]
    assert "plain torch takes 0.50 of the time" in line and "using plain torch" in line
    assert json.loads(library_path().with_suffix(".json").read_text()) == {NAME: 0.5}


def test_a_damaged_file_is_measured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    path = library_path().with_suffix(".json")
    path.parent.mkdir(parents=True)
    path.write_text("{")
    set_times(monkeypatch, 0.5, 1.0)
    assert products_for("auto", LARGE) is torch_backend
    assert json.loads(path.read_text()) == {NAME: 0.5}


def test_the_clock_measures_both_products() -> None:
    candidates = (torch_backend, cpu.products(torch.float32, 64))
    assert all(0 < seconds < 10 for seconds in measured._seconds(candidates, torch.float32, 64, 64))
