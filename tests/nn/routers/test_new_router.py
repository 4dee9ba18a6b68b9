"""A new router is one file and one registration: the package's own tests pass for a toy router."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass

import pytest

from megatron_sffn.nn.config import RouterConfig, SparseFFNConfig
from megatron_sffn.nn.parallel_layout import ParallelLayout
from megatron_sffn.nn.routers.scored import ScoredConfig
from megatron_sffn.nn.saved_bytes import LayerCall
from tests.support.paths import ROOT

FEWEST = {
    "tests/nn/routers/test_framework.py": 8,
    "tests/nn/routers/test_training.py": 1,
    "tests/nn/distributed/test_layer.py": 10,
    "tests/nn/distributed/test_training.py": 1,
    "tests/accounting/test_activations.py": 8,
    "tests/accounting/test_counts.py": 8,
    "tests/integration/test_pretrain.py": 1,
}
"""Module with tests of every router -> the least number of tests that a router has there."""
CHOSEN = "toy and not (EP4 or PP2 or DP2)"
"""pytest's -k expression: tests of the router, on the layouts of few ranks."""


def test_a_new_router_passes_the_tests_of_every_router() -> None:
    command = [sys.executable, "-m", "pytest", "-x", "-rp"]
    finished = subprocess.run(
        [*command, "-p", "tests.nn.routers.toy_registration", "-k", CHOSEN, *FEWEST],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout[-5000:] + finished.stderr[-2000:]
    passed = Counter(re.findall(r"^PASSED ([^:]+)::", finished.stdout, re.MULTILINE))
    for module, fewest in FEWEST.items():
        assert passed[module] >= fewest, f"{module}: {finished.stdout[-5000:]}"


@dataclass(frozen=True, kw_only=True)
class WithoutFormula(RouterConfig):
    """A router without a formula for the bytes it keeps for the backward pass."""

    name = "without-formula"


@dataclass(frozen=True, kw_only=True)
class WithoutScoreFormula(ScoredConfig):
    """A router with scores, without a formula for the bytes that they keep."""

    name = "without-score-formula"
    default_gate = "sigmoid"


@pytest.mark.parametrize("router", [WithoutFormula(), WithoutScoreFormula()])
def test_a_router_without_a_formula_is_never_counted_as_zero_bytes(router: RouterConfig) -> None:
    call = LayerCall(
        sffn=SparseFFNConfig(router=router, active_cells=8, block_size=2),
        hidden_size=4,
        tokens=3,
        layout=ParallelLayout(),
        activation="gelu",
        losses=frozenset(),
    )
    with pytest.raises(NotImplementedError, match=f"{type(router).__name__} has no formula for"):
        router.saved_bytes(call)
