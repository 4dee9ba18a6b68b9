"""The loss of a plan is that of the laws and of the report's surface at the plan's sizes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_sffn.accounting import ModelShape, count_parameters, flops_per_token
from megatron_sffn.nn.parallel_layout import ParallelLayout
from megatron_sffn.planning.fitted_loss import read_surfaces
from megatron_sffn.planning.loss import expansion_of, foresee_loss, planned_model
from megatron_sffn.scaling.laws import granularity
from megatron_sffn.scaling.surface import Observation, Surface, fit_surface
from megatron_sffn.scaling.surface_record import as_record
from megatron_sffn.utils.errors import ConfigError
from tests.planning.runs import workload
from tests.scaling.test_surface import observations

SHAPE = workload(ParallelLayout()).shape


@pytest.fixture(scope="module")
def surface() -> Surface:
    return fit_surface(observations((5e8, 2e9, 8e9)), bootstraps=5)


def write_report(folder: Path, surface: Surface, *names: str, **changes: Any) -> Path:
    """A report's JSON with a surface for each series, whose router is the word before a comma."""
    records = {
        name: {
            "router": name.split(",")[0],
            "expansions": [4.0],
            **as_record(surface),
            **changes,
        }
        for name in names
    }
    path = folder / "report.json"
    path.write_text(json.dumps({"surfaces": records}))
    return path


def test_half_dense_layers_halve_nothing_but_are_counted_in_the_expansion() -> None:
    # 4 layers of 1,024 dense cells, 4 of 4 · 1,024 cells with 1,024 active.
    assert expansion_of(SHAPE) == (4 + 4 * 4) / 8
    assert expansion_of(replace(SHAPE, sparse_layers=8)) == 4
    assert expansion_of(workload(ParallelLayout(), sparse=False).shape) == 1


@pytest.mark.parametrize("tied", [True, False])
def test_the_laws_get_parameters_without_embeddings_and_flops_without_recomputation(
    tied: bool,
) -> None:
    shape = replace(SHAPE, tied_embeddings=tied)
    model = planned_model(shape, 1e9)
    embeddings = 1024 * 256 * (1 if tied else 2)
    assert model.parameters == count_parameters(shape).total - embeddings
    assert model.parameters_active == count_parameters(shape).active
    assert model.compute == 3 * flops_per_token(shape).total * 1e9


def test_the_fitted_loss_is_that_of_the_surface_at_the_plan(
    tmp_path: Path, surface: Surface
) -> None:
    surfaces = read_surfaces(write_report(tmp_path, surface, "softmax-after", "avg-k").parent)
    fitted = foresee_loss(SHAPE, 1e9, surfaces).fitted
    place = Observation(
        loss=0,
        parameters=count_parameters(SHAPE).active,
        tokens=1e9,
        compute=3 * flops_per_token(SHAPE).total * 1e9,
        granularity=granularity(256, 128),
    )
    assert fitted is not None and fitted.series == "softmax-after"
    assert fitted.loss == surface.loss(place)
    assert (fitted.low, fitted.high) == surface.interval(place)


def test_a_plan_beyond_the_fitted_runs_says_by_which_factor(
    tmp_path: Path, surface: Surface
) -> None:
    path = write_report(tmp_path, surface, "softmax-after", expansions=[16.0, 64.0])
    fitted = foresee_loss(SHAPE, 8e10, read_surfaces(path)).fitted
    times_below = 1e7 / count_parameters(SHAPE).active
    assert fitted is not None and fitted.remarks == (
        f"active parameters {times_below:.3g} times below those of the smallest model",
        "tokens 10 times those of the longest training",
        "E = 4 instead of 16 and 64",
    )
    fitted = foresee_loss(SHAPE, 1.23456e15, read_surfaces(path)).fitted
    assert fitted is not None
    assert "tokens 154,000 times those of the longest training" in fitted.remarks
    assert SHAPE.sffn is not None
    fine = replace(SHAPE, sffn=replace(SHAPE.sffn, block_size=8))
    fitted = foresee_loss(fine, 1e9, read_surfaces(path)).fitted
    assert fitted is not None and "d/g 2 times those of the finest blocks" in fitted.remarks


def test_a_series_is_chosen_by_name_where_the_router_has_several(
    tmp_path: Path, surface: Surface
) -> None:
    names = ("softmax-after, expansion 4", "softmax-after, expansion 16")
    path = write_report(tmp_path, surface, *names)
    with pytest.raises(ConfigError) as error:
        foresee_loss(SHAPE, 1e9, read_surfaces(path))
    assert str(error.value) == (
        f"--loss-from {path} has 2 surfaces of the router softmax-after; choose one with "
        "--loss-series: 'softmax-after, expansion 4', 'softmax-after, expansion 16'"
    )
    fitted = foresee_loss(SHAPE, 1e9, read_surfaces(path, names[1])).fitted
    assert fitted is not None and fitted.series == names[1]
    with pytest.raises(ConfigError, match=r"^--loss-series hash is no surface of .*; give one of"):
        read_surfaces(path, "hash")


@pytest.mark.parametrize(
    ("shape", "sentence"),
    [
        (SHAPE, " has no surface of the router softmax-after; plan with --sffn-router avg-k"),
        (replace(SHAPE, sffn=None, sparse_layers=0), " has surfaces of sparse models, and this"),
    ],
)
def test_a_model_without_a_surface_is_refused(
    tmp_path: Path, surface: Surface, shape: ModelShape, sentence: str
) -> None:
    path = write_report(tmp_path, surface, "avg-k")
    with pytest.raises(ConfigError) as error:
        foresee_loss(shape, 1e9, read_surfaces(path))
    assert str(error.value).startswith(f"--loss-from {path}{sentence}")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "cannot be read"),
        ("{", "cannot be read"),
        ("[]", "is no report; give the report.json of megatron-sffn report"),
        ('{"points": []}', "is no report"),
        ('{"surfaces": {}}', "has no fitted loss surface; report on a study of at least two sizes"),
        ('{"surfaces": {"avg-k": {"values": []}}}', "lacks what a plan needs of a surface"),
        ('{"surfaces": {"avg-k": 1}}', "lacks what a plan needs of a surface"),
    ],
)
def test_a_file_that_is_no_report_is_refused_in_a_sentence(
    tmp_path: Path, content: str | None, sentence: str
) -> None:
    path = tmp_path / "report.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError) as error:
        read_surfaces(path)
    assert str(error.value).startswith(f"--loss-from {path} {sentence}")
