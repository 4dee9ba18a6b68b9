"""The number of optimizer steps survives a checkpoint, where Megatron alone would lose it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_sffn.patches import optimizer
from megatron_sffn.patches.registry import resolve

ROWS = optimizer.PATCHES


def test_installing_the_optimizer_again_replaces_nothing() -> None:
    before = [getattr(*resolve(row.target)) for row in ROWS]
    optimizer.install()
    assert [getattr(*resolve(row.target)) for row in ROWS] == before


def state(*steps: int | None) -> dict[str, Any]:
    """The state of the distributed optimizer in a checkpoint, with a group for each step."""
    groups = [{} if step is None else {"step": step} for step in steps]
    return {"optimizer": {"param_groups": groups}, "param_state": {}}


def plain(step: int | None) -> dict[str, Any]:
    """The state of the other optimizers in a checkpoint."""
    return {"param_groups": [{}], "state": {} if step is None else {"common_step": step}}


def per_parameter(step: int) -> dict[str, Any]:
    """The state of an optimizer that has a step for each parameter."""
    return {"param_groups": [{}], "state": {0: {"step": step}}}


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        ({0: state(7, 7), 1: state(0)}, {0: state(7, 7), 1: state(7)}),
        ({0: state(7), 1: state(None)}, {0: state(7), 1: state(7)}),
        ({0: plain(7), 1: plain(None)}, {0: plain(7), 1: plain(7)}),
        (plain(7), plain(7)),
        # Before the first step there is none.
        ({0: plain(None), 1: plain(None)}, {0: plain(0), 1: plain(0)}),
        # As --ckpt-format torch has them.
        ([plain(7), plain(None)], [plain(7), plain(7)]),
        ([per_parameter(7)], [per_parameter(7) | {"state": {0: {"step": 7}, "common_step": 7}}]),
    ],
)
def test_optimizers_without_a_step_get_the_step_of_the_others(saved: Any, loaded: Any) -> None:
    calls = []
    load = optimizer._with_steps_and_rates(lambda self, state_dict: calls.append(state_dict))
    load(SimpleNamespace(chained_optimizers=[]), saved)
    assert calls == [loaded]


def test_every_parameter_has_its_own_step_counter() -> None:
    shared = torch.tensor(3.0)
    parameters = [torch.zeros(2, requires_grad=True) for _ in range(2)]
    adam = torch.optim.AdamW(parameters)
    for parameter in parameters:
        adam.state[parameter] = {"step": shared, "exp_avg": torch.zeros(2)}
    load = optimizer._with_steps_and_rates(lambda self, state_dict: None)
    load(SimpleNamespace(chained_optimizers=[SimpleNamespace(optimizer=adam)]), plain(3))
    adam.state[parameters[0]]["step"] += 1
    assert [float(adam.state[p]["step"]) for p in parameters] == [4.0, 3.0]
