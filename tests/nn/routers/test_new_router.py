"""A new router is one file and one registration: the package's own tests pass for a toy router."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass

import pytest

from megatron_sffn.nn.config import RouterConfig, SparseFFNConfig
from megatron_sffn.nn.parallel_layout import ParallelLayout
from megatron_sffn.nn.routers.scored import ScoredConfig
from megatron_sffn.nn.saved_bytes import LayerCall
from tests.support.paths import ROOT

TESTS = {
    "framework": ["tests/nn/routers/test_framework.py", "tests/nn/routers/test_training.py"],
    "layouts": ["tests/nn/distributed/test_layer.py", "tests/nn/distributed/test_training.py"],
    "accounting": ["tests/accounting/test_activations.py", "tests/accounting/test_counts.py"],
    "pretraining": ["tests/integration/test_pretrain.py"],
}
CHOSEN = {"layouts": "toy and (EP2 or TP2) and not EP4 and not PP2 and not x"}
"""Kind of tests -> pytest's -k expression for them; by default all tests of the router."""
FEWEST = {"framework": 9, "layouts": 6, "accounting": 16, "pretraining": 1}
"""Kind of tests -> the least number of tests of a router."""


@pytest.mark.parametrize("kind", TESTS)
def test_a_new_router_passes_the_tests_of_every_router(kind: str) -> None:
    command = [sys.executable, "-m", "pytest", "-x", "-p", "tests.nn.routers.toy_registration"]
    finished = subprocess.run(
        [*command, "-k", CHOSEN.get(kind, "toy"), *TESTS[kind]],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout[-5000:] + finished.stderr[-2000:]
    passed = re.search(r"(\d+) passed", finished.stdout)
    assert passed is not None and int(passed[1]) >= FEWEST[kind], finished.stdout[-2000:]


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
