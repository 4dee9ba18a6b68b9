"""Tables of a study for the terminal: what will run, and how far it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from megatron_sffn.study.running.foresee import Forecast
from megatron_sffn.study.running.ladder import needed_runs
from megatron_sffn.study.running.one_run import state_of
from megatron_sffn.study.running.study_file import Study
from megatron_sffn.study.running.sweep import seconds_left
from megatron_sffn.utils.human_size import human_count
from megatron_sffn.utils.human_time import human_time
from megatron_sffn.utils.text_table import text_table


def dry_run_table(study: Study, forecasts: Sequence[Forecast]) -> str:
    """The costs of each run, their sums, and the reasons of runs that cannot start."""
    rows = [["run", "parameters", "active", "steps", "tokens", "FLOPs"]]
    listed = [forecast for forecast in forecasts if forecast.run.beyond_edge == 0]
    for forecast in listed:
        counts = [
            human_count(forecast.parameters_total),
            human_count(forecast.parameters_active),
            str(forecast.train_iters),
            human_count(forecast.tokens),
            human_count(forecast.flops),
        ]
        valid = forecast.reason is None
        rows.append(
            [forecast.run.name, *map(str.strip, counts)]
            if valid
            else [forecast.run.name, *["-"] * len(counts)]
        )
    invalid = [forecast for forecast in listed if forecast.reason is not None]
    flops = sum(forecast.flops for forecast in listed)
    return "\n".join(
        [
            text_table(rows),
            "",
            *(f"{forecast.run.name} cannot start: {forecast.reason}" for forecast in invalid),
            f"{len(listed)} runs, {len(invalid)} of which cannot start; "
            f"{human_count(flops).strip()} training FLOPs; {_time(study, listed)}",
            *_extra(forecasts),
        ]
    )


def _extra(forecasts: Sequence[Forecast]) -> list[str]:
    """A line on the runs beyond the edges of ladders, if there may be any."""
    above = [forecast for forecast in forecasts if forecast.run.beyond_edge > 0]
    flops = human_count(sum(forecast.flops for forecast in above)).strip()
    return (
        [f"and up to {len(above)} more, of {flops} FLOPs, if the best rate is at a ladder's edge"]
        if above
        else []
    )


def status_table(study: Study, forecasts: Sequence[Forecast]) -> str:
    """The state of each run, and the time left."""
    forecasts = needed_runs(study, forecasts)
    states = [state_of(study, forecast) for forecast in forecasts]
    rows = [["run", "state", "step", "loss", "perplexity"]]
    for forecast, state in zip(forecasts, states, strict=True):
        status = state.status
        rows.append(
            [
                forecast.run.name,
                state.name,
                f"{status.iteration}/{forecast.train_iters}",
                "-" if status.loss is None else f"{status.loss:.3f}",
                "-" if status.perplexity is None else f"{status.perplexity:.1f}",
            ]
        )
    failures = [
        f"{forecast.run.name} failed: {state.reason}"
        for forecast, state in zip(forecasts, states, strict=True)
        if state.name == "failed"
    ]
    counts = Counter(state.name for state in states)
    names = ("finished", "running", "failed", "waiting")
    total = ", ".join(f"{counts[name]} {name}" for name in names if counts[name])
    return "\n".join([text_table(rows), "", *failures, f"{total}; {_time(study, forecasts)}"])


def _time(study: Study, forecasts: Sequence[Forecast]) -> str:
    """The time left, in words."""
    seconds = seconds_left(study, forecasts)
    if seconds is None:
        floor = sum(forecast.floor_seconds for forecast in forecasts) / study.parallel
        return (
            f"at least {human_time(floor)} for the products of matrices alone; a better estimate "
            "needs a finished run"
        )
    return f"{human_time(seconds)} left on this machine"
