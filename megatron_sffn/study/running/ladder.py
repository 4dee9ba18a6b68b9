"""The learning rate of runs that take the best one of their point's ladder.

Inputs: a study's forecasts, and the summaries of finished runs. Outputs: the command line of a run
whose `lr` is `fitted`, once the ladder of its point has finished.

Design notes: the best rate depends on the block size (arXiv 2508.09752), so that each point has a
ladder of its own: a few rates with one seed. The other seeds train at the bottom of the parabola
through the best rate and its neighbours.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

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
    ladder = [run for run in forecasts if run.run.in_ladder and run.run.point == forecast.run.point]
    losses = {}
    for step in ladder:
        summary = read_json_object(run_folder(study, step) / SUMMARY)
        if summary.get("iterations") != step.train_iters:
            return None
        losses[float(step.run.settings["lr"])] = float(summary["validation_loss"])
    tuned, target = (Training.of_args(run.args) for run in (ladder[0], forecast))
    rate = scaled_rate(fitted_rate(losses), tuned, target)
    return dataclasses.replace(forecast, run=forecast.run.with_flag("lr", rate))


def fitted_rate(losses: Mapping[float, float]) -> float:
    """The learning rate of the lowest loss, by a parabola through the best rate's neighbours.

    Args:
        losses: learning rate -> loss of a run. A run that has diverged has NaN.

    Returns:
        The best rate itself if it is at an edge of the ladder.
    """
    finite = {rate: loss for rate, loss in sorted(losses.items()) if math.isfinite(loss)}
    if not finite:
        return min(losses)
    fitted = bottom(tuple(finite), tuple(finite.values()))
    return min(finite, key=lambda rate: finite[rate]) if fitted is None else fitted[0]
