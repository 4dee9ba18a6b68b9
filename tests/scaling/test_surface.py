"""The fit finds a known surface again from models with noise."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product

import numpy
import pytest

from megatron_sffn.scaling.surface import Observation, Surface, _losses, fit_surface, form_of
from megatron_sffn.scaling.surface_record import as_record, of_record
from megatron_sffn.utils.errors import ConfigError


def observations(tokens_of: tuple[float, ...], noise: float = 0.002) -> list[Observation]:
    """Models of a surface with its best granularity at G = 8, c = 1.5, α = 0.3 and β = 0.25."""
    generator = numpy.random.default_rng(1)
    models = []
    for n, d, g in product((1e7, 3e7, 1e8, 3e8), tokens_of, (1, 2, 4, 8, 16, 32, 64)):
        tokens = d if d > 1e6 else d * n
        u = numpy.log2(g) - 3
        loss = 1.5 + (1 + 0.02 * u**2) * (n / 1e7) ** -0.3 + (tokens / 1e9) ** -0.25
        models.append(
            Observation(
                loss=float(loss + generator.normal(0, noise)),
                parameters=n,
                tokens=tokens,
                compute=6 * n * tokens,
                granularity=g,
            )
        )
    return models


@pytest.fixture(scope="module")
def surface() -> Surface:
    return fit_surface(observations((5e8, 2e9, 8e9)), bootstraps=30)


def test_a_known_surface_is_recovered_within_its_noise(surface: Surface) -> None:
    assert surface.form.size == "parameters" and surface.form.has_tokens
    assert surface.values[0] == pytest.approx(0.3, abs=0.02)
    assert surface.values[1] == pytest.approx(0.25, abs=0.02)
    assert surface.residual == pytest.approx(0.002, abs=0.0005)
    best = surface.best_granularity()
    assert best is not None and best == pytest.approx(8, rel=0.05)


def test_the_bootstrap_encloses_the_truth_and_is_narrow(surface: Surface) -> None:
    place = Observation(loss=0, parameters=1e7, tokens=1e9, compute=6e16, granularity=8)
    low, high = surface.interval(place)
    assert low <= surface.loss(place) <= high and high - low < 0.005
    assert surface.loss(place) == pytest.approx(3.5, abs=0.003)
    interval = surface.best_granularity_interval()
    assert interval is not None and 7 < interval[0] < interval[1] < 9


def test_an_outlier_hardly_moves_the_surface() -> None:
    models = observations((5e8, 2e9, 8e9))
    outlier = Observation(**{**vars(models[10]), "loss": models[10].loss + 1})
    moved = fit_surface([*models[:10], outlier, *models[11:]], bootstraps=1)
    assert moved.values[0] == pytest.approx(0.3, abs=0.03)


def test_one_number_of_tokens_per_size_gives_a_surface_over_compute() -> None:
    surface = fit_surface(observations((20,)), bootstraps=1)
    assert surface.form.size == "compute" and not surface.form.has_tokens
    assert surface.residual < 0.01
    assert surface.best_granularity() == pytest.approx(8, rel=0.2)


def test_too_few_models_or_sizes_are_refused() -> None:
    models = observations((1e9,))
    with pytest.raises(ConfigError, match="3 trained models cannot fix a loss surface"):
        fit_surface(models[:3])
    with pytest.raises(ConfigError, match="cannot fix"):
        fit_surface([])
    with pytest.raises(ConfigError, match="one size"):
        fit_surface(models[:7])


def test_the_jacobian_is_that_of_finite_differences(surface: Surface) -> None:
    models, values = observations((5e8, 2e9, 8e9)), surface.values
    jacobian = surface.form.jacobian(values, models)
    for index, column in enumerate(jacobian.T):
        step = numpy.zeros_like(values)
        step[index] = 1e-6
        slope = _losses(surface.form, values + step, models)
        slope = (slope - _losses(surface.form, values - step, models)) / 2e-6
        numpy.testing.assert_allclose(column, slope, atol=1e-6)


def test_two_numbers_of_tokens_leave_no_asymptote_and_two_by_two_no_tokens() -> None:
    assert not form_of(observations((5e8, 2e9))).has_asymptote
    assert form_of(observations((5e8, 2e9, 8e9))).has_asymptote
    few = [model for model in observations((5e8, 2e9)) if model.parameters < 1e8]
    assert form_of(few).size == "compute"


def test_a_surface_comes_back_whole_from_json(surface: Surface) -> None:
    read = of_record(json.loads(json.dumps(as_record(surface))))
    place = Observation(loss=0, parameters=2e7, tokens=3e9, compute=3.6e17, granularity=5)
    assert read.loss(place) == surface.loss(place)
    assert read.interval(place) == surface.interval(place)
    assert read.ranges == surface.ranges and read.form == surface.form


def test_a_place_beyond_the_fitted_models_is_told_with_its_factor(surface: Surface) -> None:
    assert surface.ranges["parameters"] == (1e7, 3e8) and surface.ranges["tokens"] == (5e8, 8e9)
    inside = Observation(loss=0, parameters=1e7, tokens=8e9, compute=4.8e17, granularity=64)
    assert surface.outside(inside) == {}
    beyond = surface.outside(replace(inside, parameters=1e6, tokens=8e10))
    assert beyond == {"parameters": pytest.approx(0.1), "tokens": pytest.approx(10)}


@pytest.mark.parametrize("missing", ["draws", "form", "ranges", "values"])
def test_a_record_without_a_part_is_refused(surface: Surface, missing: str) -> None:
    record = as_record(surface)
    del record[missing]
    with pytest.raises(KeyError, match=missing):
        of_record(record)


@pytest.mark.parametrize(("name", "numbers"), [("values", [1.0]), ("draws", [])])
def test_numbers_that_do_not_fit_the_form_are_refused(
    surface: Surface, name: str, numbers: list[float]
) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        of_record({**as_record(surface), name: numbers})
