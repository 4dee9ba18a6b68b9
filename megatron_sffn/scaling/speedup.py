"""Effective speedup: quality and speed of a model in one number.

Inputs: loss, compute and seconds of a model and of its baseline. Outputs: how many times as long
the baseline would have to train for the loss of the model.

Design notes: the currency is that of marin's grug-moe. The law of the baseline goes through its own
point, so that the speedup of the baseline itself is 1 and only the law's slope matters. The
asymptote and the exponent are fitted to baselines of at least three budgets; with fewer they are
published ones, which were fitted to other data, and `BaselineLaw.source` says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy
from scipy.optimize import least_squares

from megatron_sffn.scaling.laws import MARIN_ASYMPTOTE, MARIN_EXPONENT

MIN_BUDGETS = 3
"""Budgets that fix an asymptote, a factor and an exponent."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A trained model.

    Args:
        loss: in nats per token.
        compute: FLOPs of the training.
        seconds: time of the training; None if it is not known.
    """

    loss: float
    compute: float
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class BaselineLaw:
    """How the loss of the baseline falls with compute C: asymptote + factor · C^-exponent.

    The factor is chosen such that the law goes through the baseline that is compared.

    Args:
        asymptote: loss of infinite compute in nats per token.
        exponent: of the compute.
        source: a phrase that says where both come from.
    """

    asymptote: float
    exponent: float
    source: str

    def compute_for(self, loss: float, baseline: Trained) -> float | None:
        """FLOPs that the baseline needs for a loss; None if no compute suffices.

        None is also the answer if the baseline itself is below the asymptote, so that the law does
        not describe it.
        """
        if min(loss, baseline.loss) <= self.asymptote:
            return None
        ratio = (baseline.loss - self.asymptote) / (loss - self.asymptote)
        return baseline.compute * float(ratio ** (1 / self.exponent))


PUBLISHED = BaselineLaw(
    asymptote=MARIN_ASYMPTOTE,
    exponent=MARIN_EXPONENT,
    source="published by marin for grug-moe and not fitted to this study, so that only the order "
    "of speedups counts",
)


def baseline_law(baselines: Sequence[Trained]) -> BaselineLaw:
    """The law of baselines of several budgets; a published one if there are fewer than three.

    Args:
        baselines: the dense models of all budgets.
    """
    compute = numpy.array([model.compute for model in baselines])
    losses = numpy.array([model.loss for model in baselines])
    budgets = len(set(compute))
    if budgets < MIN_BUDGETS or numpy.ptp(losses) == 0:
        return PUBLISHED
    scale = numpy.exp(numpy.log(compute).mean())
    start = [losses.min() / 2, losses.mean() - losses.min() / 2, 0.1]
    fit = least_squares(
        lambda law: law[0] + law[1] * (compute / scale) ** -law[2] - losses,
        start,
        bounds=([0, 0, 1e-3], [losses.min() * (1 - 1e-6), numpy.inf, 2]),
        x_scale=[1, 1, 0.1],
        loss="huber",
        f_scale=0.01,
    )
    asymptote, _, exponent = map(float, fit.x)
    source = f"fitted to the dense models of {budgets} budgets of this study"
    if budgets == MIN_BUDGETS:
        source += ", which leave no residual to judge it by"
    return BaselineLaw(asymptote=asymptote, exponent=exponent, source=source)


@dataclass(frozen=True, kw_only=True)
class Speedup:
    """What a model gains over its baseline.

    Args:
        compute: FLOPs that the baseline needs for the loss of the model, over those of the model.
        time: seconds that the baseline needs, over those of the model; None if the time of one of
            them is not known.
    """

    compute: float
    time: float | None


def effective_speedup(model: Trained, baseline: Trained, law: BaselineLaw) -> Speedup | None:
    """The effective speedup of a model; None if the baseline never reaches its loss.

    `(C_needed / rate_baseline) / (C / rate_model)`, with rates in FLOPs per second.

    Args:
        model: the model whose loss is wanted.
        baseline: of about the same size; the law goes through it.
        law: of the baseline.
    """
    needed = law.compute_for(model.loss, baseline)
    if needed is None:
        return None
    time = None
    if model.seconds and baseline.seconds:
        time = needed / (baseline.compute / baseline.seconds) / model.seconds
    return Speedup(compute=needed / model.compute, time=time)
