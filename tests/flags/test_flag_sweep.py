"""The results of the sweep of flags, and a sample that is tried again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.flag_sweep import GOLDEN, actions, flag_of
from tests.flag_values import NEEDS, NO_EFFECT, VALUES
from tests.support.paths import ROOT
from tests.support.processes import HANGS

# Megatron's parser gives this warning.
pytestmark = pytest.mark.filterwarnings("ignore:'type' is deprecated:DeprecationWarning")

RESULTS = json.loads(GOLDEN.read_text())


def test_every_flag_was_tried() -> None:
    flags = {flag_of(action) for action in actions()}
    assert set(RESULTS) == flags
    assert set(VALUES) | set(NEEDS) <= flags


def test_every_flag_works_or_is_refused_or_has_a_reason() -> None:
    assert {entry["class"] for entry in RESULTS.values()} == {"works", "refused", "no effect"}
    idle = {
        flag: entry["reason"] for flag, entry in RESULTS.items() if entry["class"] == "no effect"
    }
    assert idle == {flag: reason for reason, flags in NO_EFFECT.items() for flag in flags.split()}


def test_a_sample_of_flags_has_the_same_results_again(tmp_path: Path) -> None:
    flags = ("--rope-scaling-factor", "--manual-gc", "--rl-profile", "--muon-momentum")
    out = tmp_path / "flags.json"
    only = f"^({'|'.join(flags)})$"
    command = [sys.executable, "-m", "tests.flag_sweep", "--only", only, "--out", str(out)]
    subprocess.run(command, check=True, timeout=HANGS, cwd=ROOT)
    assert json.loads(out.read_text()) == {flag: RESULTS[flag] for flag in flags}
