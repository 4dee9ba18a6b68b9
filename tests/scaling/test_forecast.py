"""Each law foresees what it gives by hand, and says why it leaves a model out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_sffn.scaling import laws
from megatron_sffn.scaling.forecast import (
    LOSS_LAWS,
    PlannedModel,
    leverage_forecast,
    loss_forecasts,
    loss_range,
)

SPARSE = PlannedModel(
    hidden_size=512,
    block_size=256,
    expansion=64,
    parameters=2e9,
    parameters_active=1e8,
    tokens=1e10,
    compute=6e18,
)
DENSE = replace(SPARSE, block_size=None, expansion=1, parameters=8e7)


def test_every_law_foresees_a_sparse_model_of_the_expansion_of_krajewski() -> None:
    forecasts = {forecast.law: forecast for forecast in loss_forecasts(SPARSE)}
    assert forecasts.keys() == LOSS_LAWS.keys()
    assert all(forecast.source and not forecast.reason for forecast in forecasts.values())
    assert forecasts["Krajewski 2024"].value == laws.KRAJEWSKI_SPARSE.loss(
        parameters=2e9, tokens=1e10, granularity=8
    )
    assert forecasts["Ludziejewski 2025"].value == laws.ludziejewski_loss(
        expansion=64, parameters_active=1e8, tokens=1e10
    )
    assert forecasts["marin grug-moe"].value == laws.marin_loss(compute=6e18)
    values = [forecast.value for forecast in forecasts.values() if forecast.value]
    assert loss_range(loss_forecasts(SPARSE)) == (min(values), max(values))


def test_krajewski_is_left_out_for_another_expansion() -> None:
    krajewski, *_ = loss_forecasts(replace(SPARSE, expansion=16))
    assert krajewski.value is None
    assert krajewski.reason == "it was fitted to an expansion of 64, and this model has 16"


def test_a_dense_model_has_losses_of_dense_laws_and_no_leverage() -> None:
    forecasts = {forecast.law: forecast for forecast in loss_forecasts(DENSE)}
    assert forecasts["Krajewski 2024"].value == laws.KRAJEWSKI_DENSE.loss(
        parameters=8e7, tokens=1e10
    )
    assert forecasts["Ludziejewski 2025"].value is not None
    assert "this model is dense" in forecasts["marin grug-moe"].reason
    assert "this model is dense" in leverage_forecast(DENSE).reason


def test_the_leverage_is_that_of_ling() -> None:
    assert leverage_forecast(SPARSE).value == pytest.approx(
        laws.ling_leverage(expansion=64, block_size=256, hidden_size=512, compute=6e18)
    )


def test_no_law_has_no_range() -> None:
    assert loss_range([leverage_forecast(DENSE)]) is None
