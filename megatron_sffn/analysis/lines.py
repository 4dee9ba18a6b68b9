"""`routing.jsonl` as curves: numbers and loads of each layer against the steps.

Enters: the lines of `routing_log.py`. Leaves: per layer, steps and what belongs to them.
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
    """One number of one layer.

    Args:
        steps: ascending.
        values: at each of them.
    """

    steps: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Loads:
    """Tokens of each block of one layer.

    Args:
        steps: of the evaluations, ascending.
        tokens: `[steps, B]`.
    """

    steps: tuple[int, ...]
    tokens: NDArray[numpy.integer]

    @property
    def relative(self) -> NDArray[numpy.float64]:
        """`[steps, B]` load in multiples of an even one."""
        mean = self.tokens.mean(axis=1, keepdims=True)
        return self.tokens / numpy.maximum(mean, 1e-9)


def read_lines(run: Path) -> list[dict[str, Any]]:
    """The lines of a run.

    Raises:
        ConfigError: if there are none, or they are not lines of ours.
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
    """Number -> layer -> its curve over training, of the numbers that the router has."""
    training = [line for line in lines if line.get("phase") == TRAINING]
    found: dict[str, dict[int, Curve]] = {}
    for name in (*NUMBERS, *LOSSES):
        for layer in layers_in(training):
            points = [
                (line["iteration"], line[name])
                for line in training
                if line["layer"] == layer and line.get(name) is not None
            ]
            if points:
                steps, values = zip(*points, strict=True)
                found.setdefault(name, {})[layer] = Curve(steps=steps, values=values)
    return found


def loads(lines: Sequence[dict[str, Any]]) -> dict[int, Loads]:
    """Layer -> the loads that evaluations left."""
    found = {}
    evaluated = [line for line in lines if line.get("phase", EVALUATION) == EVALUATION]
    for layer in layers_in(evaluated):
        own = {line["iteration"]: line for line in evaluated if line["layer"] == layer}
        found[layer] = Loads(
            steps=tuple(sorted(own)),
            tokens=numpy.array([own[step]["tokens_per_block"] for step in sorted(own)]),
        )
    return found
