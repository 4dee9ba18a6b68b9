"""Muon trains the blocks of one rank on every layout, also on those that split blocks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.nn.distributed.test_training import LAYOUTS, assert_same, trained
from tests.support.engine import Layout, Variant
from tests.support.slow import slow

ONE_RANK = Layout(dtype=torch.float32, optimizer="muon")
SWIGLU: tuple[tuple[str, Any], ...] = (("gated_linear_unit", True), ("activation_func", F.silu))
VARIANTS = {
    "avg-k": Variant("avg-k"),
    "switch, swiglu": Variant("switch", megatron=SWIGLU),
    "lorkm, swiglu": Variant("lorkm", megatron=SWIGLU, factors=("keys:0.5,gates:2", "values:0")),
    "learned": Variant("avg-k", (("descriptor", "learned"), ("gate", "sigmoid"))),
    "shared blocks": Variant("switch", sffn=(("shared_blocks", 2),)),
    "pkm": Variant("pkm"),
}


SPLIT_BLOCKS = {name: variant for name, variant in VARIANTS.items() if variant.router != "pkm"}
"""Variants whose blocks have several cells, which ETP can split."""


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        *(("EP2 ETP2", variant) for variant in SPLIT_BLOCKS),
        ("TP2 EP2 folded", "pkm"),
        *(
            slow(name, variant)
            for name in ("DP2", "TP2 EP2 folded", "PP2 VPP2", "TP2 PP2 VPP2 EP2 ETP2")
            for variant in SPLIT_BLOCKS
        ),
    ],
)
def test_every_layout_trains_the_model_of_one_rank_with_muon(name: str, variant: str) -> None:
    variants = tuple((SPLIT_BLOCKS if variant in SPLIT_BLOCKS else VARIANTS).values())
    layout = replace(LAYOUTS[name], dtype=torch.float32, optimizer="muon")
    actual, expected = (trained(run, variants)[VARIANTS[variant]] for run in (layout, ONE_RANK))
    assert_same(actual, expected, 1e-4, 2e-5)
