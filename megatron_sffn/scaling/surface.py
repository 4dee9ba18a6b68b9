"""Our loss surface over size, tokens and granularity, fitted to the runs of a study.

L = c + (a + h₁u + h₂u²) / S^α + b / D^β, with u = log2 G and G = 4d/g. The size S is the number of
active parameters; where each size was trained with one number of tokens, so that both cannot be
told apart, S is the compute and the term with D is left out.

Design notes:
- Two sizes cannot tell the asymptote c from the exponent α, nor two numbers of tokens from β. With
  fewer than three of one of them, c is 0.
- One fit of the whole surface. Parabolas through runs of equal compute have a biased optimum
  (arXiv 2603.22339).
- The square of u permits an optimum of g (Ling 2025) as well as none (Krajewski 2024).
- Variable projection: for given exponents the other coefficients follow from linear least squares,
  so only the exponents are searched, from several starts. From the best one, all coefficients
  minimise the Huber loss together. The bootstrap draws models with replacement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy
from numpy.typing import NDArray
from scipy.optimize import least_squares, lsq_linear

from megatron_sffn.utils.errors import ConfigError

Floats = NDArray[numpy.float64]

STARTS = (0.05, 0.15, 0.3, 0.6)
"""First values of each exponent."""
EXPONENT_BOUNDS = (0.01, 2.0)
HUBER_NATS = 0.01
"""Residual in nats per token from which on the Huber loss is linear."""
BOOTSTRAPS = 100
FIXING = 3
"""Sizes, and numbers of tokens, that fix an asymptote besides an exponent."""
QUANTILES = (0.1, 0.9)
RANGED = ("parameters", "tokens", "granularity")
"""Numbers of an observation beyond whose fitted range a surface is an extrapolation."""


@dataclass(frozen=True, kw_only=True)
class Observation:
    """A trained model.

    Args:
        loss: in nats per token.
        parameters: number of active parameters.
        tokens: number of training tokens.
        compute: FLOPs of the training.
        granularity: G = 4d / g.
    """

    loss: float
    parameters: float
    tokens: float
    compute: float
    granularity: float


@dataclass(frozen=True, kw_only=True)
class Form:
    """Which terms of the surface the runs can tell apart.

    Args:
        size: "parameters" or "compute".
        has_asymptote: the surface has a constant c.
        has_tokens: the surface has a term of the tokens.
        degree: degree in log2 G, 0 to 2.
        size_scale: unit of the size, so that all coefficients are near 1.
        tokens_scale: unit of the tokens.
    """

    size: str
    has_asymptote: bool
    has_tokens: bool
    degree: int
    size_scale: float
    tokens_scale: float

    @property
    def exponents(self) -> int:
        """Number of exponents."""
        return 1 + self.has_tokens

    @property
    def coefficients(self) -> int:
        """Number of all coefficients."""
        return 2 * self.exponents + self.has_asymptote + self.degree

    def logs(self, observations: Sequence[Observation]) -> list[Floats]:
        """The logarithm of the size, and that of the tokens if they have a term."""
        logs = [numpy.log([getattr(model, self.size) for model in observations])]
        logs[0] -= numpy.log(self.size_scale)
        if self.has_tokens:
            tokens = numpy.log([model.tokens for model in observations])
            logs.append(tokens - numpy.log(self.tokens_scale))
        return logs

    def columns(self, exponents: Floats, observations: Sequence[Observation]) -> Floats:
        """The factors of c, a, h₁, h₂ and b for each model."""
        u = numpy.log2([model.granularity for model in observations])
        powers = [
            numpy.exp(-exponent * log)
            for exponent, log in zip(exponents, self.logs(observations), strict=True)
        ]
        columns = [numpy.ones_like(u)] * self.has_asymptote
        columns += [powers[0] * u**degree for degree in range(self.degree + 1)]
        return numpy.stack([*columns, *powers[1:]], axis=1)

    def jacobian(self, values: Floats, observations: Sequence[Observation]) -> Floats:
        """The derivatives of the loss of each model by the exponents and the coefficients."""
        columns = self.columns(values[: self.exponents], observations)
        terms = columns * values[self.exponents :]
        size_terms = terms[:, self.has_asymptote : self.has_asymptote + self.degree + 1]
        parts = [size_terms.sum(axis=1), terms[:, -1]]
        logs = self.logs(observations)
        slopes = [-log * part for log, part in zip(logs, parts, strict=False)]
        return numpy.column_stack([*slopes, columns])

    def linear_bounds(self) -> tuple[list[float], list[float]]:
        """c and b are at least 0; the terms of the granularity are free."""
        lower = (
            [0.0] * self.has_asymptote + [-numpy.inf] * (self.degree + 1) + [0.0] * self.has_tokens
        )
        return lower, [numpy.inf] * len(lower)


@dataclass(frozen=True, kw_only=True)
class Surface:
    """A fitted loss surface.

    Args:
        form: its terms.
        values: the exponents, then c, a, h₁, h₂ and b in the units of the form.
        draws: the same of each draw of the bootstrap.
        residual: root of the mean squared residual in nats per token.
        ranges: name in `RANGED` -> the lowest and the highest value of the fitted models.
    """

    form: Form
    values: Floats
    draws: Floats
    residual: float
    ranges: dict[str, tuple[float, float]]

    def loss(self, observation: Observation) -> float:
        """The loss at the place of a model, whose own loss is not read."""
        return float(_losses(self.form, self.values, [observation])[0])

    def interval(self, observation: Observation) -> tuple[float, float]:
        """The 10 % and 90 % quantiles of the loss among the draws of the bootstrap."""
        losses = [_losses(self.form, draw, [observation])[0] for draw in self.draws]
        low, high = numpy.quantile(losses, QUANTILES)
        return float(low), float(high)

    def outside(self, observation: Observation) -> dict[str, float]:
        """How far a place is beyond the fitted models.

        Returns:
            Name in `RANGED` -> its value over the highest one (above 1), or over the lowest one
            (below 1); empty within the ranges.
        """
        factors = {}
        for name, (low, high) in self.ranges.items():
            value = getattr(observation, name)
            if not low <= value <= high:
                factors[name] = value / (high if value > high else low)
        return factors

    def exponent_interval(self) -> tuple[float, float]:
        """The 10 % and 90 % quantiles of the exponent of the size."""
        low, high = numpy.quantile(self.draws[:, 0], QUANTILES)
        return float(low), float(high)

    def best_granularity(self) -> float | None:
        """G with the lowest loss; None if the surface has no minimum in G."""
        return _best_granularity(self.form, self.values)

    def best_granularity_interval(self) -> tuple[float, float] | None:
        """The 10 % and 90 % quantiles of the best G; None if a tenth of the draws has none."""
        best = [_best_granularity(self.form, draw) for draw in self.draws]
        found = [value for value in best if value is not None]
        if len(found) < 0.9 * len(best):
            return None
        low, high = numpy.quantile(found, QUANTILES)
        return float(low), float(high)


def _losses(form: Form, values: Floats, observations: Sequence[Observation]) -> Floats:
    exponents, linear = values[: form.exponents], values[form.exponents :]
    losses: Floats = form.columns(exponents, observations) @ linear
    return losses


def _best_granularity(form: Form, values: Floats) -> float | None:
    if form.degree < 2:
        return None
    start = form.exponents + form.has_asymptote + 1
    first, second = values[start : start + 2]
    return float(2 ** (-first / (2 * second))) if second > 0 else None


def form_of(observations: Sequence[Observation]) -> Form:
    """The terms that these models can tell apart."""
    sizes = {model.parameters for model in observations}
    tokens = {model.tokens for model in observations}
    pairs = {(model.parameters, model.tokens) for model in observations}
    has_tokens = (
        min(len(sizes), len(tokens)) > 1
        and max(len(sizes), len(tokens)) >= FIXING
        and len(pairs) > max(len(sizes), len(tokens))
    )
    size = "parameters" if has_tokens or len(tokens) == 1 else "compute"
    scale = numpy.exp(numpy.log([getattr(model, size) for model in observations]).mean())
    places = [{getattr(model, size) for model in observations}, *([tokens] * has_tokens)]
    granularities = {model.granularity for model in observations}
    return Form(
        size=size,
        has_asymptote=min(map(len, places)) >= FIXING,
        has_tokens=has_tokens,
        degree=min(2, len(granularities) - 1),
        size_scale=float(scale),
        tokens_scale=float(numpy.exp(numpy.log([m.tokens for m in observations]).mean())),
    )


def fit_surface(observations: Sequence[Observation], *, bootstraps: int = BOOTSTRAPS) -> Surface:
    """Fit the surface.

    Args:
        observations: trained models of at least two sizes.
        bootstraps: number of draws for the intervals.

    Raises:
        ConfigError: if there are too few models.
    """
    form = form_of(observations) if observations else None
    if form is None or len(observations) <= form.coefficients:
        needed = 4 if form is None else form.coefficients + 1
        raise ConfigError(
            f"{len(observations)} trained models cannot fix a loss surface; train at least {needed}"
        )
    if len({getattr(model, form.size) for model in observations}) < 2:
        raise ConfigError("all trained models have one size; a loss surface needs at least two")
    values = _polish(form, _project(form, observations), observations)
    generator = numpy.random.default_rng(0)
    draws = [_polish(form, values, _draw(form, observations, generator)) for _ in range(bootstraps)]
    residuals = _losses(form, values, observations) - _measured(observations)
    return Surface(
        form=form,
        values=values,
        draws=numpy.stack(draws),
        residual=float(numpy.sqrt((residuals**2).mean())),
        ranges={name: _range(name, observations) for name in RANGED},
    )


def _range(name: str, observations: Sequence[Observation]) -> tuple[float, float]:
    values = [float(getattr(model, name)) for model in observations]
    return min(values), max(values)


def _draw(
    form: Form, observations: Sequence[Observation], generator: numpy.random.Generator
) -> list[Observation]:
    """A draw with replacement in which every size occurs, so that it fixes the exponent."""
    sizes = {getattr(model, form.size) for model in observations}
    while True:
        ids = generator.integers(len(observations), size=len(observations))
        drawn = [observations[i] for i in ids]
        if {getattr(model, form.size) for model in drawn} == sizes:
            return drawn


def _measured(observations: Sequence[Observation]) -> Floats:
    return numpy.array([model.loss for model in observations])


def _project(form: Form, observations: Sequence[Observation]) -> Floats:
    """Variable projection: the best exponents from all starts, and their linear coefficients."""
    losses, bounds = _measured(observations), form.linear_bounds()

    def linear(exponents: Floats) -> Floats:
        solution: Floats = lsq_linear(form.columns(exponents, observations), losses, bounds).x
        return solution

    def residuals(exponents: Floats) -> Floats:
        fitted: Floats = form.columns(exponents, observations) @ linear(exponents)
        return fitted - losses

    fits = [
        least_squares(
            residuals, start, bounds=EXPONENT_BOUNDS, loss="huber", f_scale=HUBER_NATS, max_nfev=60
        )
        for start in product(STARTS, repeat=form.exponents)
    ]
    exponents = min(fits, key=lambda fit: fit.cost).x
    return numpy.concatenate([exponents, linear(exponents)])


def _polish(form: Form, values: Floats, observations: Sequence[Observation]) -> Floats:
    """All coefficients together, from a start, with the least Huber loss."""
    losses = _measured(observations)
    lower, upper = form.linear_bounds()
    bounds = (
        numpy.array([EXPONENT_BOUNDS[0]] * form.exponents + lower),
        numpy.array([EXPONENT_BOUNDS[1]] * form.exponents + upper),
    )
    fit = least_squares(
        lambda candidate: _losses(form, candidate, observations) - losses,
        numpy.clip(values, bounds[0] + 1e-9, bounds[1]),
        jac=lambda candidate: form.jacobian(candidate, observations),
        bounds=bounds,
        loss="huber",
        f_scale=HUBER_NATS,
        max_nfev=200,
    )
    result: Floats = fit.x
    return result
