"""The learning rate of runs that take the best one of their point's ladder.

Inputs: a study's forecasts, and the summaries of finished runs. Outputs: the command line of a run
whose `lr` is `fitted`, once the ladder of its point has finished; and whether a ladder needs a run
beyond its edge.

Design notes: the best rate depends on the block size (arXiv 2508.09752), so that each point has a
ladder of its own: a few rates with one seed. The other seeds train at the bottom of the parabola
through the best rate and its neighbours.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from megatron_sffn.study.learning_rates import FITTED, bottom
from megatron_sffn.study.running.foresee import Forecast
from megatron_sffn.study.running.one_run import run_folder
from megatron_sffn.study.running.study_file import Study
from megatron_sffn.study.running.transfer import Training, scaled_rate
from megatron_sffn.study.runs import SUMMARY
from megatron_sffn.utils.atomic_files import read_json_object


def with_rate(study: Study, forecast: Forecast, forecasts: Sequence[Forecast]) -> Forecast | None:
    """A forecast with the learning rate in its flags; None until its ladder has finished.

    Args:
        study: the study.
        forecast: the run.
        forecasts: all runs of the study.
    """
    if forecast.run.rate_source != FITTED:
        return forecast
    ladder = _ladder_of(forecast, forecasts)
    needed = [is_needed(study, run, forecasts) for run in ladder]
    losses = _losses(study, list(itertools.compress(ladder, needed)))
    if losses is None or None in needed:
        return None
    tuned, target = (Training.of_args(run.args) for run in (ladder[0], forecast))
    rate = scaled_rate(fitted_rate(losses), tuned, target)
    return dataclasses.replace(forecast, run=forecast.run.with_flag("lr", rate))


def is_needed(study: Study, forecast: Forecast, forecasts: Sequence[Forecast]) -> bool | None:
    """Whether a run has to be trained; None until that is known.

    A run beyond the edge of a ladder is needed if the best rate so far is the one beside it.

    Args:
        study: the study.
        forecast: the run.
        forecasts: all runs of the study.
    """
    place = forecast.run.beyond_edge
    if place == 0:
        return True
    side = 1 if place > 0 else -1
    ladder = _ladder_of(forecast, forecasts)
    inner = [run for run in ladder if 0 <= run.run.beyond_edge * side < abs(place)]
    for run in inner:
        if not (needed := is_needed(study, run, forecasts)):
            return needed
    losses = _losses(study, inner)
    if losses is None:
        return None
    return best_rate(losses) == (max(losses) if place > 0 else min(losses))


def needed_runs(study: Study, forecasts: Sequence[Forecast]) -> list[Forecast]:
    """The runs that have to be trained, as far as that is known."""
    return [run for run in forecasts if is_needed(study, run, forecasts)]


def _ladder_of(forecast: Forecast, forecasts: Sequence[Forecast]) -> list[Forecast]:
    """The ladder of a run's point."""
    return [run for run in forecasts if run.run.in_ladder and run.run.point == forecast.run.point]


def _losses(study: Study, ladder: Sequence[Forecast]) -> dict[float, float] | None:
    """Learning rate -> mean loss over the seeds of a ladder; None until all runs have finished."""
    losses: dict[float, list[float]] = {}
    for run in ladder:
        summary = read_json_object(run_folder(study, run) / SUMMARY)
        if summary.get("iterations") != run.train_iters:
            return None
        rate = float(run.run.settings["lr"])
        losses.setdefault(rate, []).append(float(summary["validation_loss"]))
    return {rate: fmean(of_seeds) for rate, of_seeds in losses.items()}


def fitted_rate(losses: Mapping[float, float]) -> float:
    """The learning rate of the lowest loss, by a parabola through the best rate's neighbours.

    Args:
        losses: learning rate -> loss of a run. A run that has diverged has NaN.

    Returns:
        The best rate itself if it is at an edge of the ladder.
    """
    finite = _finite(losses)
    fitted = bottom(tuple(finite), tuple(finite.values())) if finite else None
    return best_rate(losses) if fitted is None else fitted[0]


def best_rate(losses: Mapping[float, float]) -> float:
    """The learning rate of the lowest loss; the lowest rate if all runs have diverged."""
    finite = _finite(losses)
    return min(finite, key=finite.__getitem__) if finite else min(losses)


def _finite(losses: Mapping[float, float]) -> dict[float, float]:
    """The rates that have not diverged, in ascending order."""
    return {rate: loss for rate, loss in sorted(losses.items()) if math.isfinite(loss)}
