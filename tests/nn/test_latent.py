"""Latent layers on one rank: the formula, the rows that are scored, and what is refused."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.moe import moe_layer
from torch import Tensor

from megatron_sffn.nn.config import Backend, SparseFFNConfig
from megatron_sffn.nn.layer import SparseFFN
from megatron_sffn.nn.routers import ROUTERS
from megatron_sffn.utils.errors import ConfigError
from tests.parity.compare import outcome
from tests.parity.test_megatron import FP32, megatron_layer, megatron_outcome
from tests.support.router_cases import Case, D, build, inputs

pytestmark = pytest.mark.usefixtures("one_rank")

L = 6
LATENT = (("latent_size", L),)
NO_LOSS = (("moe_router_load_balancing_type", "none"), ("moe_aux_loss_coeff", 0.0))


def latent_layer(router: str, **fields: Any) -> SparseFFN:
    return build(Case(router=router, sffn=LATENT, megatron=NO_LOSS, **fields))


@pytest.mark.parametrize("router", ["avg-k", "vanilla-m", "switch", "rand-hash"])
def test_tokens_go_through_a_projection_the_blocks_and_a_projection_back(router: str) -> None:
    layer = latent_layer(router)
    hidden, ids, _ = inputs()
    x = hidden.flatten(0, 1)
    rows = x @ layer.fc1_latent_proj.weight.T
    scored = rows if ROUTERS[router].scores_rows else x
    keys, values = layer.experts()
    routing = layer.router(scored, keys, ids.T.flatten())
    per_block = torch.einsum("bgl,tl->tbg", keys, rows)
    sums = torch.einsum("tbg,bgl->tbl", F.gelu(per_block), values)
    chosen = sums.gather(1, routing.block_ids[:, :, None].expand(-1, -1, L))
    gates = 1.0 if routing.gates is None else routing.gates[:, :, None]
    expected = (gates * chosen).sum(dim=1) @ layer.fc2_latent_proj.weight.T
    torch.testing.assert_close(layer(hidden, padding_mask=ids)[0].flatten(0, 1), expected)


def test_the_projections_have_megatrons_names_and_initial_distributions() -> None:
    layer = latent_layer("avg-k")
    shapes = {name: list(weight.shape) for name, weight in layer.named_parameters()}
    assert shapes["fc1_latent_proj.weight"] == [L, D]
    assert shapes["fc2_latent_proj.weight"] == [D, L]
    again = latent_layer("avg-k")
    for name in ("fc1_latent_proj", "fc2_latent_proj"):
        assert torch.equal(getattr(layer, name).weight, getattr(again, name).weight)
    # 0.5, and for the output of 2 layers 0.5 / 2.
    assert 0.3 < float(layer.fc1_latent_proj.weight.detach().std()) < 0.7
    assert 0.15 < float(layer.fc2_latent_proj.weight.detach().std()) < 0.35
    other_layer = SparseFFN(layer.router.config, layer_number=2)
    assert not torch.equal(other_layer.fc1_latent_proj.weight, layer.fc1_latent_proj.weight)


class LocalLinear(torch.nn.Module):
    """In place of Transformer Engine's linear layer in Megatron's own latent layer."""

    def __init__(self, inputs: int, outputs: int, **_: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(outputs, inputs, dtype=torch.float64))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return F.linear(x, self.weight), None


@pytest.mark.filterwarnings("ignore:MLP requires ffn_hidden_size:DeprecationWarning")
@pytest.mark.parametrize("shared", [0, 2])
def test_the_layer_agrees_with_megatrons(monkeypatch: pytest.MonkeyPatch, shared: int) -> None:
    monkeypatch.setattr(moe_layer, "HAVE_TE", True)
    monkeypatch.setattr(moe_layer, "TELinear", LocalLinear)
    case = partial(Case, router="switch", swiglu=True, megatron=NO_LOSS)
    layer = build(case(sffn=(*LATENT, ("shared_blocks", shared))))
    reference = megatron_layer(layer, moe_router_pre_softmax=True, moe_latent_size=L)
    names = ("fc1_latent_proj", "fc2_latent_proj")
    with torch.no_grad():
        for name in names:
            getattr(reference, name).weight.copy_(getattr(layer, name).weight)

    def gradients(module: Any) -> dict[str, Tensor | None]:
        return {name: getattr(module, name).weight.grad for name in (*names, "router")}

    expected = megatron_outcome(reference) | gradients(reference)
    actual = outcome(
        lambda x: layer(x)[0],
        lambda: gradients(layer) | {n: w.grad for n, w in layer.experts.named_parameters()},
    )
    expected.pop("weight")
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=FP32, atol=FP32, msg=name)
        assert value.abs().max() > 1e-6, name


@pytest.mark.parametrize(
    ("router", "numbers", "sentence"),
    [
        ("avg-k", {"latent_size": 0}, "--moe-latent-size 0 must be at least 1"),
        (
            "pkm",
            {"latent_size": 8, "block_size": 1, "active_cells": 16, "expansion": 16},
            "--sffn-router pkm has values alone; leave it out",
        ),
        (
            "switch",
            {"latent_size": 8, "backend": Backend.MEGATRON},
            "not available with --sffn-backend megatron, for which Megatron needs Transformer",
        ),
    ],
)
def test_what_has_no_latent_rows_is_refused(
    router: str, numbers: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        SparseFFNConfig(
            router=ROUTERS[router](), **{"active_cells": 16, "block_size": 4, **numbers}
        )
