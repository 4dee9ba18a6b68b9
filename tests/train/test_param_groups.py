"""Keys, values and gates move by their factors of the learning rate and of the weight decay."""

from __future__ import annotations

import warnings
from argparse import Namespace
from typing import Any

import pytest
import torch
from megatron.core.optimizer import (
    OptimizerConfig,
    get_megatron_optimizer,
    get_mup_config_overrides,
)
from megatron.core.optimizer import get_standard_config_overrides as standard_overrides
from torch import Tensor

from megatron_sffn.train import param_groups
from tests.support.engine import Layout, Variant, build
from tests.support.ranks import run_ranks

LR, DECAY = 0.01, 0.1
FACTORS = {"keys": (1.0, 0.5), "values": (4.0, 0.0), "gates": (0.5, 1.0)}
"""Group -> factors of its learning rate and weight decay."""
FLAGS = ("values:4,gates:0.5", "keys:0.5,values:0")
CASES = [
    ("adam", Variant("switch")),
    ("sgd", Variant("switch")),
    # Its queries have a bias, which is a vector and has no weight decay.
    ("adam", Variant("pkm")),
    ("muon", Variant("sigma-moe")),
    # Megatron's experts are keys and values one by one.
    ("adam", Variant("switch", sffn=(("backend", "megatron"),))),
]


def steps(cases: list[Any]) -> list[list[dict[str, Tensor]]]:
    """What one step subtracts from each weight, for each case without and with the flags."""
    warnings.simplefilter("ignore")  # Megatron warns about its dense MLP
    return [[step(*case, flags) for flags in ((None, None), FLAGS)] for case in cases]


def step(
    optimizer_name: str, variant: Variant, flags: tuple[str | None, str | None], mup: float = 1.0
) -> dict[str, Tensor]:
    chunks = build(variant, Layout(dtype=torch.float32))
    param_groups.install(Namespace(sffn_lr_mult=flags[0], sffn_wd_mult=flags[1]))
    config = OptimizerConfig(
        optimizer=optimizer_name, lr=LR, min_lr=LR / 10, weight_decay=DECAY, clip_grad=0.0
    )
    overrides = standard_overrides(config) | get_mup_config_overrides(config, mup, optimizer_name)
    optimizer = get_megatron_optimizer(config, chunks, overrides)
    for group in optimizer.param_groups:  # as Megatron's scheduler does in every step
        assert group["min_lr"] == pytest.approx(group["max_lr"] / 10)
        group["lr"] = group["max_lr"]
        group["weight_decay"] = DECAY * group["wd_mult"]
    draw = torch.Generator().manual_seed(1)
    weights = dict(chunks[0].named_parameters())
    for weight in weights.values():
        weight.main_grad.copy_(torch.randn(weight.shape, generator=draw))
    before = {name: weight.detach().double().clone() for name, weight in weights.items()}
    optimizer.step()
    moved = {name: before[name] - weight.detach().double() for name, weight in weights.items()}
    # Coupled or not, weight decay subtracts lr · decay · weight in the first step.
    return {name: torch.stack((moved[name], LR * DECAY * before[name])) for name in moved}


def group_of(name: str) -> str | None:
    if "mlp.router." in name:
        return "gates"
    if "mlp.experts." in name:
        return "values" if name.endswith(("values", "fc2.weight")) else "keys"
    return None


def test_a_step_is_multiplied_by_the_factors_of_a_group() -> None:
    (results,) = run_ranks(1, steps, CASES)
    for (optimizer, variant), (plain, flagged) in zip(CASES, results, strict=True):
        met, vectors = set(), set()
        for name, (move, decay) in plain.items():
            group = group_of(name)
            rate_factor, decay_factor = FACTORS.get(group or "", (1.0, 1.0))
            met.add(group)
            vectors |= {group} if move.dim() == 1 else set()
            decayed = 0.0 if move.dim() == 1 else decay
            expected = rate_factor * (move - decayed + decay_factor * decayed)
            torch.testing.assert_close(
                flagged[name][0],
                expected,
                rtol=1e-4,
                atol=2e-7,
                msg=f"{optimizer} {variant} {name}",
            )
        assert met >= {None, "values", "gates"}
        assert "gates" in vectors or variant.router != "pkm"


def with_mup(flags: tuple[str | None, str | None]) -> dict[str, Tensor]:
    warnings.simplefilter("ignore")
    return step("adam", Variant("switch"), flags, mup=2.0)


def test_a_factor_multiplies_the_learning_rate_of_mup() -> None:
    plain, flagged = (run_ranks(1, with_mup, flags)[0] for flags in ((None, None), FLAGS))
    for name in plain:
        if group_of(name) == "gates":
            torch.testing.assert_close(flagged[name][0], plain[name][0] / 2, rtol=1e-4, atol=2e-7)
