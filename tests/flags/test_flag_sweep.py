"""The results of the sweep of flags, and a sample that is tried again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.flag_sweep import GOLDEN, GOLDEN_OF_MAIN, actions, flag_of
from tests.flag_values import NEEDS, NO_EFFECT, VALUES
from tests.support.paths import ROOT
from tests.support.processes import HANGS

# Megatron's parser gives this warning.
pytestmark = pytest.mark.filterwarnings("ignore:'type' is deprecated:DeprecationWarning")

RESULTS = json.loads(GOLDEN.read_text())
RESULTS_OF_MAIN = json.loads(GOLDEN_OF_MAIN.read_text())
NOT_IN_MAIN = {"--disable-stream-ckpt-dequant", "--moe-ncclep-static-shape"}


def test_every_flag_was_tried() -> None:
    flags = {flag_of(action) for action in actions()}
    flags_of_main = set(RESULTS) - NOT_IN_MAIN | set(RESULTS_OF_MAIN)
    assert flags == (flags_of_main if flags & set(RESULTS_OF_MAIN) else set(RESULTS))
    assert set(VALUES) | set(NEEDS) <= flags


def test_every_flag_works_or_is_refused_or_has_a_reason() -> None:
    results = RESULTS | RESULTS_OF_MAIN
    assert {entry["class"] for entry in results.values()} == {"works", "refused", "no effect"}
    idle = {
        flag: entry["reason"] for flag, entry in results.items() if entry["class"] == "no effect"
    }
    assert idle == {flag: reason for reason, flags in NO_EFFECT.items() for flag in flags.split()}


def test_a_sample_of_flags_has_the_same_results_again(tmp_path: Path) -> None:
    flags = ("--rope-scaling-factor", "--manual-gc", "--rl-profile", "--muon-momentum")
    out = tmp_path / "flags.json"
    only = f"^({'|'.join(flags)})$"
    command = [sys.executable, "-m", "tests.flag_sweep", "--only", only, "--out", str(out)]
    subprocess.run(command, check=True, timeout=HANGS, cwd=ROOT)
    assert json.loads(out.read_text()) == {flag: RESULTS[flag] for flag in flags}
