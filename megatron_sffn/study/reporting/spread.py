"""The variance of each setting's loss over seeds, estimated from all settings of a study together.

Inputs: the losses of each setting. Outputs: a `Spread` for each.

Design notes: the variance of three seeds is often far too small by chance, and a test that trusts
it calls chance a finding. Empirical Bayes shrinks each variance towards a common value, the more
the less they differ beyond chance (Smyth 2004, doi 10.2202/1544-6115.1027).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import optimize, special, stats

MOST_FREEDOM = 1e6
"""Degrees of freedom of a common value from which all variances count as equal."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A setting's losses as a test sees them.

    Args:
        mean: in nats per token.
        count: number of seeds.
        variance: of the loss of one seed.
        freedom: degrees of freedom of the variance.
        all_freedom: degrees of freedom of all settings together, which no test can exceed.
    """

    mean: float
    count: int
    variance: float
    freedom: float
    all_freedom: float

    @property
    def of_mean(self) -> float:
        """The variance of the mean."""
        return self.variance / self.count


def spreads(losses: Sequence[Sequence[float]]) -> list[Spread | None]:
    """The spread of each setting; None for a setting with a single seed."""
    samples = [
        (statistics.variance(values), len(values) - 1) if len(values) > 1 else None
        for values in losses
    ]
    common, freedom = _common([sample for sample in samples if sample and sample[0] > 0])
    all_freedom = sum(sample[1] for sample in samples if sample)
    return [
        Spread(
            mean=statistics.fmean(values),
            count=len(values),
            variance=(freedom * common + sample[1] * sample[0]) / (freedom + sample[1]),
            freedom=min(freedom + sample[1], all_freedom),
            all_freedom=all_freedom,
        )
        if sample
        else None
        for values, sample in zip(losses, samples, strict=True)
    ]


def _common(samples: Sequence[tuple[float, int]]) -> tuple[float, float]:
    """The value towards which variances shrink, and its degrees of freedom (0: they do not).

    Args:
        samples: variance and degrees of freedom of each setting.
    """
    if len(samples) < 2:
        return 0.0, 0.0
    halves = [freedom / 2 for _, freedom in samples]
    logs = [
        math.log(variance) - special.digamma(half) + math.log(half)
        for (variance, _), half in zip(samples, halves, strict=True)
    ]
    # The variance of log variances beyond that of samples from equal true variances.
    excess = statistics.variance(logs) - statistics.fmean(map(_trigamma, halves))
    if excess <= _trigamma(MOST_FREEDOM / 2):
        return math.exp(statistics.fmean(logs)), MOST_FREEDOM
    half = optimize.brentq(lambda value: _trigamma(value) - excess, 1e-6, MOST_FREEDOM)
    return math.exp(statistics.fmean(logs) + special.digamma(half) - math.log(half)), 2 * half


def _trigamma(value: float) -> float:
    return float(special.polygamma(1, value))


def p_value(first: Spread, second: Spread) -> float:
    """The probability of a difference as large as this between equal means (Welch's test)."""
    total = first.of_mean + second.of_mean
    if not total:
        return 1.0 if first.mean == second.mean else 0.0
    parts = (spread.of_mean**2 / spread.freedom for spread in (first, second))
    freedom = min(total**2 / sum(parts), first.all_freedom)
    return float(2 * stats.t.sf(abs(first.mean - second.mean) / math.sqrt(total), freedom))
