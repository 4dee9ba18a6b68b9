"""The example of the layer in a plain PyTorch loop learns, whatever the router."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.support.paths import ROOT
from tests.support.slow import slow


# In a process of its own: the tests of training give this one the names of a GPU.
@pytest.mark.parametrize("router", ["avg-k", slow("rand-hash"), slow("pkm")])
def test_the_loss_of_the_example_falls(router: str) -> None:
    script = ROOT / "examples" / "library" / "train.py"
    flags = ["--text", "docs/methods.md", "--router", router, "--steps", "10"]
    process = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), *flags],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    losses = [float(loss) for loss in re.findall(r"held-out loss ([\d.]+)", process.stdout)]
    assert len(losses) == 6 and losses[-1] < losses[0] - 1, losses
