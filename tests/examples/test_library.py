"""The sparse layer trains in a loop of plain PyTorch, without process groups made by hand."""

from __future__ import annotations

import pytest
import torch

from examples.library.train import ROUTERS, train
from tests.support.paths import ROOT


@pytest.mark.parametrize("router", list(ROUTERS))
def test_the_loss_of_the_library_example_falls(router: str) -> None:
    losses = train((ROOT / "LICENSE").read_bytes(), router, steps=30)
    assert losses[0] > 5 and sum(losses[-5:]) / 5 < losses[0] - 1.5
    assert not torch.distributed.is_initialized()
