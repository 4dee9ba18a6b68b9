"""Reads `routing.jsonl` as curves: metrics and loads of each layer over the steps.

Inputs: the lines of `train/routing_metrics.py`. Outputs: for each layer, steps and their values.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from megatron_sffn.train.routing_metrics import EVALUATION, LOSSES, NUMBERS, TRAINING
from megatron_sffn.utils.atomic_files import read_records
from megatron_sffn.utils.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A metric of a layer over the steps.

    Args:
        steps: ascending.
        values: the value at each step.
    """

    steps: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Loads:
    """Tokens of each block of a layer.

    Args:
        steps: steps of the evaluations, ascending.
        tokens: `[steps, B]`.
    """

    steps: tuple[int, ...]
    tokens: NDArray[numpy.integer]

    @property
    def relative(self) -> NDArray[numpy.float64]:
        """`[steps, B]`, the load in multiples of an even load."""
        mean = self.tokens.mean(axis=1, keepdims=True)
        return self.tokens / numpy.maximum(mean, 1e-9)


def read_lines(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's `routing.jsonl`.

    Raises:
        ConfigError: if there are none, or this package did not write them.
    """
    path = run / "routing.jsonl"
    if not run.is_dir():
        raise ConfigError(f"{run} is not a folder; give the one that a run was saved in (--save)")
    try:
        lines = read_records(path)
        if not all({"iteration", "layer"} <= line.keys() for line in lines):
            raise ValueError("a line without iteration and layer")
    except (AttributeError, json.JSONDecodeError, UnicodeDecodeError, ValueError) as error:
        raise ConfigError(
            f"{path} cannot be read ({error}); give the folder of a run of megatron_sffn.pretrain"
        ) from error
    if not lines:
        raise ConfigError(
            f"{run} has no routing.jsonl with lines: it is no run's folder, the run is dense, or "
            "it ended before its first line (--log-interval); give the --save folder of a sparse "
            "run"
        )
    return lines


def layers_in(lines: Sequence[dict[str, Any]]) -> list[int]:
    """The sparse layers, counted from 1."""
    return sorted({line["layer"] for line in lines})


def curves(lines: Sequence[dict[str, Any]]) -> dict[str, dict[int, Curve]]:
    """Metric -> layer -> its curve over training; metrics that the router lacks are left out."""
    training = [line for line in lines if line.get("phase") == TRAINING]
    curve_of: dict[str, dict[int, Curve]] = {}
    for name in (*NUMBERS, *LOSSES):
        for layer in layers_in(training):
            points = [
                (line["iteration"], line[name])
                for line in training
                if line["layer"] == layer and line.get(name) is not None
            ]
            if points:
                steps, values = zip(*points, strict=True)
                curve_of.setdefault(name, {})[layer] = Curve(steps=steps, values=values)
    return curve_of


def loads(lines: Sequence[dict[str, Any]]) -> dict[int, Loads]:
    """Layer -> its loads in the evaluations."""
    loads_of = {}
    evaluated = [line for line in lines if line.get("phase", EVALUATION) == EVALUATION]
    for layer in layers_in(evaluated):
        line_at = {line["iteration"]: line for line in evaluated if line["layer"] == layer}
        loads_of[layer] = Loads(
            steps=tuple(sorted(line_at)),
            tokens=numpy.array([line_at[step]["tokens_per_block"] for step in sorted(line_at)]),
        )
    return loads_of
