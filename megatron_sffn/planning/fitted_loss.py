"""The loss of a plan by the surface that `megatron-sffn report` fitted to runs of one's own.

Inputs: `report.json`, a planned model. Outputs: a `FittedLoss`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sffn.nn.config import SparseFFNConfig
from megatron_sffn.scaling.forecast import PlannedModel
from megatron_sffn.scaling.laws import granularity
from megatron_sffn.scaling.surface import Observation, Surface
from megatron_sffn.scaling.surface_record import of_record
from megatron_sffn.utils.errors import ConfigError

BEYOND = {
    "parameters": ("active parameters", "the largest model", "the smallest model"),
    "tokens": ("tokens", "the longest training", "the shortest training"),
    # G = 4d/g is large where blocks are small.
    "granularity": ("d/g", "the finest blocks", "the coarsest blocks"),
}
"""Name of a range -> what it counts, and whose number its upper and its lower end are."""


@dataclass(frozen=True, kw_only=True)
class FittedLoss:
    """A loss by a fitted surface.

    Args:
        series: of the surface.
        loss: in nats per token.
        low: 10 % quantile among the draws of the bootstrap.
        high: 90 % quantile.
        remarks: clauses that say how the plan differs from the fitted runs.
    """

    series: str
    loss: float
    low: float
    high: float
    remarks: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class FittedSurface:
    """One surface of a report.

    Args:
        router: of the fitted runs.
        expansions: E of the fitted runs.
        surface: the fit.
    """

    router: str
    expansions: tuple[float, ...]
    surface: Surface


@dataclass(frozen=True, kw_only=True)
class FittedSurfaces:
    """The surfaces of a report.

    Args:
        path: of the report's JSON.
        by_series: series -> its surface.
        chosen: the series to use; None for the only one of the plan's router.
    """

    path: Path
    by_series: dict[str, FittedSurface]
    chosen: str | None = None

    def foresee(self, model: PlannedModel, sffn: SparseFFNConfig | None) -> FittedLoss:
        """The loss of a planned model.

        Args:
            model: the model.
            sffn: its sparse layer; None if it is dense.

        Raises:
            ConfigError: if no surface, or more than one, is of the plan's router.
        """
        if sffn is None or model.block_size is None:
            raise ConfigError(
                f"--loss-from {self.path} has surfaces of sparse models, and this model is dense; "
                "add --sffn-router, or leave --loss-from out"
            )
        series = self._series_for(sffn.router.name)
        fitted = self.by_series[series]
        place = Observation(
            loss=0.0,
            parameters=model.parameters_active,
            tokens=model.tokens,
            compute=model.compute,
            granularity=granularity(model.hidden_size, model.block_size),
        )
        low, high = fitted.surface.interval(place)
        return FittedLoss(
            series=series,
            loss=fitted.surface.loss(place),
            low=low,
            high=high,
            remarks=(*_beyond(fitted.surface, place), *_other_expansion(fitted, sffn)),
        )

    def _series_for(self, router: str) -> str:
        if self.chosen is not None:
            return self.chosen
        series = [name for name, fitted in self.by_series.items() if fitted.router == router]
        if len(series) == 1:
            return series[0]
        if series:
            raise ConfigError(
                f"--loss-from {self.path} has {len(series)} surfaces of the router {router}; "
                f"choose one with --loss-series: {_quoted(series)}"
            )
        raise ConfigError(
            f"--loss-from {self.path} has no surface of the router {router}; plan with "
            f"--sffn-router {' or '.join(sorted({fit.router for fit in self.by_series.values()}))},"
            " or choose a surface with --loss-series"
        )


def read_surfaces(path: Path, series: str | None = None) -> FittedSurfaces:
    """The surfaces of a report.

    Args:
        path: of `report.json`, or of its folder.
        series: the one to use; None for the only one of the plan's router.

    Raises:
        ConfigError: if there are none, or none by this name.
    """
    file = path / "report.json" if path.is_dir() else path
    records = _surface_records(file)
    try:
        fitted = {name: _fitted(record) for name, record in records.items()}
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ConfigError(
            f"--loss-from {file} lacks what a plan needs of a surface ({error}); write it again "
            "with this version's megatron-sffn report"
        ) from error
    if series is not None and series not in fitted:
        raise ConfigError(
            f"--loss-series {series} is no surface of {file}; give one of {_quoted(list(fitted))}"
        )
    return FittedSurfaces(path=file, by_series=fitted, chosen=series)


def _surface_records(file: Path) -> dict[str, Any]:
    """The records of the surfaces in a report's JSON, at least one."""
    try:
        report = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--loss-from {file} cannot be read ({error}); give the --output folder of "
            "megatron-sffn report, or its report.json"
        ) from error
    records = report.get("surfaces") if isinstance(report, dict) else None
    if not isinstance(records, dict):
        raise ConfigError(
            f"--loss-from {file} is no report; give the report.json of megatron-sffn report"
        )
    if not records:
        raise ConfigError(
            f"--loss-from {file} has no fitted loss surface; report on a study of at least two "
            "sizes, and see its remarks for what was missing"
        )
    return records


def _fitted(record: Any) -> FittedSurface:
    return FittedSurface(
        router=str(record["router"]),
        expansions=tuple(map(float, record["expansions"])),
        surface=of_record(record),
    )


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


def _beyond(surface: Surface, place: Observation) -> list[str]:
    """How far a plan is beyond the fitted runs, a clause for each number."""
    clauses = []
    for name, factor in surface.outside(place).items():
        what, highest, lowest = BEYOND[name]
        if factor > 1:
            clauses.append(f"{what} {_rounded(factor)} times those of {highest}")
        else:
            clauses.append(f"{what} {_rounded(1 / factor)} times below those of {lowest}")
    return clauses


def _rounded(factor: float) -> str:
    """Three digits, without an exponent."""
    return f"{float(f'{factor:.3g}'):,.10g}"


def _other_expansion(fitted: FittedSurface, sffn: SparseFFNConfig) -> list[str]:
    """A clause if no fitted run has the expansion of the plan."""
    if not fitted.expansions or sffn.expansion in fitted.expansions:
        return []
    expansions = " and ".join(f"{expansion:g}" for expansion in fitted.expansions)
    return [f"E = {sffn.expansion} instead of {expansions}"]
