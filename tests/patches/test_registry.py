"""The registry of patches: every row is true, and applying it twice is applying it once."""

from __future__ import annotations

import importlib
import inspect
import math
import re
from collections.abc import Iterator

import pytest

from megatron_sffn.patches import PATCHES_BY_OCCASION, registry
from megatron_sffn.patches.__main__ import main
from megatron_sffn.patches.registry import Patch, apply, resolve

ROWS = [patch for patches in PATCHES_BY_OCCASION.values() for patch in patches]
OUTSIDE_CPU = [
    patch
    for occasion, patches in PATCHES_BY_OCCASION.items()
    for patch in patches
    if occasion != "on a machine without CUDA"  # tests/patches/test_cpu.py
]


def test_no_name_has_two_rows() -> None:
    targets = [row.target for row in ROWS]
    assert len(set(targets)) == len(targets)


@pytest.mark.parametrize("row", OUTSIDE_CPU, ids=lambda row: row.target)
def test_the_code_that_needs_a_patch_uses_the_replaced_name(row: Patch) -> None:
    resolve(row.target)
    try:
        user = importlib.import_module(row.needed_by)
    except ImportError:
        user = getattr(*resolve(row.needed_by))
    name = row.target.removesuffix(".__init__").rpartition(".")[2]
    assert re.search(rf"\b{name}\b", inspect.getsource(user))


def test_the_command_prints_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    printed = capsys.readouterr().out
    assert f"\non a machine without CUDA: {len(ROWS) - len(OUTSIDE_CPU)}\n" in printed
    for row in ROWS:
        assert row.why and row.until, row.target
        assert (
            f"  {row.target}\n    needed_by  {row.needed_by}\n    why        {row.why}\n"
            f"    until      {row.until}\n"
        ) in printed


@pytest.fixture
def row(monkeypatch: pytest.MonkeyPatch) -> Iterator[Patch]:
    """A patch of `math.tau`, which is taken back after the test."""
    monkeypatch.setattr(math, "tau", 1.0)
    yield Patch(target="math.tau", needed_by="math", why="it is small", until="it is large")
    registry._APPLIED.pop("math.tau")


def test_a_patch_that_is_applied_again_changes_nothing(row: Patch) -> None:
    def double(original: float) -> float:
        return 2 * original

    for _ in range(2):
        apply(row, double)
        assert math.tau == 2.0


def test_another_replacement_is_built_from_the_original(row: Patch) -> None:
    apply(row, lambda original: 2 * original)
    apply(row, lambda original: 5 * original)
    assert math.tau == 5.0
