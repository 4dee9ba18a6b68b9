"""Final losses that the published laws foresee for a model that is not trained yet.

Inputs: the sizes of a model and its tokens. Outputs: a number of each law, or the reason why it
says nothing.

Design notes:
- A law is applied only to the kind of model that it was fitted to.
- Where some layers are dense, the expansion is that of all feed-forward layers together.
- Krajewski's N leaves out embeddings; Ludziejewski's N has them, as in the report of a study.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_sffn.scaling import laws

KRAJEWSKI_EXPANSION = 64
"""The only expansion for which Krajewski 2024 trained sparse models."""


class NotCoveredError(Exception):
    """A law was not fitted to such a model; the message is a clause that says why."""


@dataclass(frozen=True, kw_only=True)
class PlannedModel:
    """A model and its training, as the laws see them.

    Args:
        hidden_size: d.
        block_size: g in cells; None for a dense model.
        expansion: cells of all feed-forward layers over those that a token uses.
        parameters: all of them but those of the embeddings.
        parameters_active: that one token uses, with embeddings.
        tokens: number of training tokens.
        compute: FLOPs of the training, without recomputation.
    """

    hidden_size: int
    block_size: int | None
    expansion: float
    parameters: float
    parameters_active: float
    tokens: float
    compute: float


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What one law says.

    Args:
        law: its name.
        source: where it is published.
        value: a loss in nats per token, or a leverage; None if there is a reason.
        reason: why the law says nothing.
    """

    law: str
    source: str
    value: float | None = None
    reason: str = ""


def _krajewski(model: PlannedModel) -> float:
    size = {"parameters": model.parameters, "tokens": model.tokens}
    if model.block_size is None:
        return laws.KRAJEWSKI_DENSE.loss(**size)
    if model.expansion != KRAJEWSKI_EXPANSION:
        raise NotCoveredError(
            f"it was fitted to an expansion of {KRAJEWSKI_EXPANSION}, and this model has "
            f"{model.expansion:.3g}"
        )
    granularity = laws.granularity(model.hidden_size, model.block_size)
    return laws.KRAJEWSKI_SPARSE.loss(**size, granularity=granularity)


def _ludziejewski(model: PlannedModel) -> float:
    return laws.ludziejewski_loss(
        expansion=model.expansion,
        parameters_active=model.parameters_active,
        tokens=model.tokens,
    )


def _marin(model: PlannedModel) -> float:
    if model.block_size is None:
        raise NotCoveredError("it was fitted to sparse models, and this model is dense")
    return laws.marin_loss(compute=model.compute)


def _ling(model: PlannedModel) -> float:
    if model.block_size is None:
        raise NotCoveredError("it compares sparse models with dense ones, and this model is dense")
    return laws.ling_leverage(
        expansion=model.expansion,
        block_size=model.block_size,
        hidden_size=model.hidden_size,
        compute=model.compute,
    )


LOSS_LAWS: dict[str, tuple[str, Callable[[PlannedModel], float]]] = {
    "Krajewski 2024": ("arXiv 2402.07871, table 1", _krajewski),
    "Ludziejewski 2025": ("arXiv 2502.05172, table 3", _ludziejewski),
    "marin grug-moe": ("the marin project, loss on Paloma", _marin),
}
"""Name of a law of losses -> its source, and its loss in nats per token."""


def loss_forecasts(model: PlannedModel) -> tuple[Forecast, ...]:
    """What each law of losses says about a model."""
    return tuple(_forecast(name, *law, model) for name, law in LOSS_LAWS.items())


def leverage_forecast(model: PlannedModel) -> Forecast:
    """Compute of a dense model of equal loss over that of this model, by Ling 2025."""
    return _forecast("Ling 2025", "arXiv 2507.17702, table 2", _ling, model)


def loss_range(forecasts: Sequence[Forecast]) -> tuple[float, float] | None:
    """The lowest and the highest loss of the laws; None if none of them applies."""
    values = [forecast.value for forecast in forecasts if forecast.value is not None]
    return (min(values), max(values)) if values else None


def _forecast(
    name: str, source: str, law: Callable[[PlannedModel], float], model: PlannedModel
) -> Forecast:
    try:
        return Forecast(law=name, source=source, value=law(model))
    except NotCoveredError as error:
        return Forecast(law=name, source=source, reason=str(error))
