"""Foresees a study: parameters, tokens and FLOPs of each run, and why a run cannot start.

Inputs: a `Study`. Outputs: a `Forecast` for each run, with the command line that the sweep starts.

Design notes: the flags go through the run's own parser and checks, so that what is refused here is
what a run would refuse. The rate of this machine is measured when it is asked for, so that a job
that only needs the flags keeps no memory on a GPU.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from torch.utils.benchmark import Timer

from megatron_sffn.accounting import ModelShape, count_parameters, training_flops_per_token
from megatron_sffn.checks.data import check_data
from megatron_sffn.flags.sffn_flags import sffn_config
from megatron_sffn.patches.cpu import is_host
from megatron_sffn.study.learning_rates import FITTED, TRANSFERRED
from megatron_sffn.study.running.study_file import Study, StudyRun
from megatron_sffn.study.running.transfer import transferred_rate
from megatron_sffn.train.first_rank import as_first_rank, parse_as_first_rank
from megatron_sffn.train.run_description import SECTIONS
from megatron_sffn.utils.errors import ConfigError

CELL_MULTIPLE = 8
"""A dense layer that is widened gets a multiple of so many cells."""


DATA = (*SECTIONS["data"], *SECTIONS["tokenizer"], *SECTIONS["batch"])
"""Settings (argparse dest) that determine what is checked of the data."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a run will be.

    Args:
        run: the run; its flags are complete, but for those of its folder.
        reason: why it cannot start; None if it can. Without a reason the rest is known.
        parameters_total: all parameters.
        parameters_active: parameters that one token uses.
        train_iters: steps.
        tokens: tokens of all steps.
        flops: training FLOPs of all steps: three times those of the forward pass.
        args: Megatron's namespace of the run.
    """

    run: StudyRun
    reason: str | None = None
    parameters_total: int = 0
    parameters_active: int = 0
    train_iters: int = 0
    tokens: int = 0
    flops: float = 0.0
    args: Namespace = field(default_factory=Namespace)

    @property
    def floor_seconds(self) -> float:
        """Time of the FLOPs at the rate of this machine's dense products; 0 if it cannot start."""
        if self.reason is not None:
            return 0.0
        args = self.args
        tokens = args.micro_batch_size * args.seq_length
        rate = _flops_per_second(tokens, args.hidden_size, args.ffn_hidden_size)
        return self.flops / (rate * args.world_size)


def foresee(study: Study) -> list[Forecast]:
    """The forecast of each run of a study."""
    runs = _of_equal_parameters(study) if study.match == "parameters" else study.runs
    checked_data: set[str] = set()
    return [_forecast(run, study, checked_data) for run in runs]


def valid_forecasts(study: Study) -> list[Forecast]:
    """The forecasts of a study all of whose runs can start.

    Raises:
        ConfigError: with the reason of the first run that cannot.
    """
    forecasts = foresee(study)
    listed = [forecast for forecast in forecasts if forecast.run.beyond_edge == 0]
    invalid = [forecast for forecast in listed if forecast.reason is not None]
    if invalid:
        raise ConfigError(
            f"{len(invalid)} of {len(listed)} runs cannot start; dry-run lists them all. "
            f"{invalid[0].run.name}: {invalid[0].reason}"
        )
    return forecasts


def _forecast(run: StudyRun, study: Study, checked_data: set[str]) -> Forecast:
    """The forecast of one run.

    Args:
        run: the run.
        study: its study.
        checked_data: data and lengths that were checked already, for other runs; gets this run's.
    """
    try:
        args, shape = _parsed(run.flags, study.ranks)
        per_step = args.global_batch_size * args.seq_length
        per_token = training_flops_per_token(shape, recompute=args.recompute_granularity == "full")
        steps = args.train_iters
        if study.target_flops is not None:
            steps = max(1, round(study.target_flops / (per_token * per_step)))
        if steps is None:
            raise ConfigError(
                "--train-iters is missing, which makes runs comparable; give it, or target-flops "
                "in the study's file"
            )
        if run.in_ladder:
            steps = max(1, round(study.ladder_steps * steps))
        if steps != args.train_iters:
            run = run.with_flag("train-iters", steps)
            args, shape = _parsed(run.flags, study.ranks)
        if run.rate_source == TRANSFERRED and study.transfer is not None:
            run = run.with_flag("lr", transferred_rate(study.transfer, args))
        if run.rate_source == FITTED and not (args.sffn_eval_iters or args.full_validation):
            raise ConfigError(
                "lr fitted needs a validation loss; give --eval-iters or --full-validation"
            )
        data = repr([vars(args).get(name) for name in DATA])
        if data not in checked_data:
            with as_first_rank(run.flags, study.ranks):
                check_data(args)
            checked_data.add(data)
    except ConfigError as error:
        return Forecast(run=run, reason=str(error))
    parameters = count_parameters(shape)
    return Forecast(
        run=run,
        args=args,
        parameters_total=parameters.total,
        parameters_active=parameters.active,
        train_iters=args.train_iters,
        tokens=args.train_iters * per_step,
        flops=per_token * per_step * args.train_iters,
    )


@cache
def _flops_per_second(tokens: int, width: int, cells: int) -> float:
    """Rate of one rank's feed-forward product on this machine: one thread, or its GPU."""
    is_cuda = not is_host()
    dtype = torch.bfloat16 if is_cuda else torch.float32
    device = "cuda" if is_cuda else "cpu"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    x, keys = (torch.randn(rows, width, device=device, dtype=dtype) for rows in (tokens, cells))
    measured = Timer("x @ keys.T", globals={"x": x, "keys": keys}).blocked_autorange()
    torch.set_num_threads(threads)
    return 2 * tokens * width * cells / float(measured.median)


def _parsed(flags: Sequence[str], ranks: int) -> tuple[Namespace, ModelShape]:
    """The namespace and the shape of a run."""
    args, _ = parse_as_first_rank(flags, ranks, read_tokenizer=True)
    return args, ModelShape.of_args(args, sffn_config(args))


def _of_equal_parameters(study: Study) -> list[StudyRun]:
    """The runs, with dense layers as wide as the parameters of the first sparse run ask for."""
    sparse = [run for run in study.runs if run.settings.get("sffn-router") != "dense"]
    if not sparse:
        raise ConfigError(
            "match parameters needs a sparse run whose parameters the dense ones get; add a point "
            "with another sffn-router, or write match: active"
        )
    _, shape = _parsed(sparse[0].flags, study.ranks)
    wanted = count_parameters(shape).total
    return [
        run if run.settings.get("sffn-router") != "dense" else _widened(run, wanted, study.ranks)
        for run in study.runs
    ]


def _widened(run: StudyRun, parameters: int, ranks: int) -> StudyRun:
    """A dense run with a feed-forward layer of as many cells as make up the parameters."""
    args, shape = _parsed(run.flags, ranks)
    total = count_parameters(shape).total
    cells = args.ffn_hidden_size
    wider = (*run.flags, "--ffn-hidden-size", str(cells + CELL_MULTIPLE))
    per_multiple = count_parameters(_parsed(wider, ranks)[1]).total - total
    cells += CELL_MULTIPLE * round((parameters - total) / per_multiple)
    return run.with_flag("ffn-hidden-size", cells)
