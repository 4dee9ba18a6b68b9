"""The registry of patches: every row is true, and applying it twice is applying it once."""

from __future__ import annotations

import importlib
import inspect
import math
import re
from collections.abc import Iterator

import pytest

from megatron_sffn.patches import PATCHES_BY_OCCASION, megatron, registry
from megatron_sffn.patches.__main__ import main
from megatron_sffn.patches.registry import Patch, apply, dropped_line, resolve
from megatron_sffn.utils.errors import ConfigError

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


@pytest.mark.parametrize(
    "row",
    [row for row in OUTSIDE_CPU if row.target not in registry.DROPPED],
    ids=lambda row: row.target,
)
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


def test_a_patch_that_the_installed_release_does_not_need_drops_out_with_a_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(registry, "DROPPED", {})

    def removed(made_for: str, is_removed: bool) -> Patch:
        return Patch(
            target=f"math.{made_for}",
            needed_by="math",
            why="it is small",
            until="math has no tau_2",
            fixed=lambda module: is_removed and not hasattr(module, "tau_2"),
        )

    apply(removed("tau", True), lambda original: 0.0)
    assert math.tau > 6
    apply(removed("tau_2", True), lambda original: 0.0)
    assert not hasattr(math, "tau_2")
    expected = "math.tau (math has no tau_2); math.tau_2 (math has no tau_2)"
    assert dropped_line() == f"no longer replaced: {expected}"
    # A name that is gone for another reason is still an error.
    with pytest.raises(ConfigError, match=r"^math\.tau_2, .* does not exist"):
        apply(removed("tau_2", False), lambda original: 0.0)


class WithTwoWidths:
    def __init__(self, config: object, k_channels: int, v_channels: int) -> None:
        """As Transformer Engine's attention."""


def test_rows_that_can_drop_out_see_the_change_in_megatron() -> None:
    fixed = {row.target.rpartition(".")[2]: row.fixed for row in megatron.PATCHES if row.fixed}
    assert fixed.keys() == {"__init__", "TENorm"}
    assert fixed["__init__"](WithTwoWidths)
    assert fixed["TENorm"](math)
