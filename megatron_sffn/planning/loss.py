"""The final loss that laws foresee for the model and the tokens of a plan.

Inputs: the model's shape, the budget of tokens, and the report of a study if there is one.
Outputs: a `Foreseen`.

Design notes: published laws were fitted to other data and tokenizers, so only differences between
their losses mean something. A surface that a report fitted to one's own runs does not have this
flaw, but a plan is mostly far beyond these runs; by how much is always said.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_sffn.accounting import ModelShape, count_parameters, flops_per_token
from megatron_sffn.accounting.parameters import embedding_parameters, output_parameters
from megatron_sffn.scaling.forecast import (
    Forecast,
    PlannedModel,
    leverage_forecast,
    loss_forecasts,
    loss_range,
)

if TYPE_CHECKING:  # it needs scipy, of the extra `study`
    from megatron_sffn.planning.fitted_loss import FittedLoss, FittedSurfaces


@dataclass(frozen=True, kw_only=True)
class Foreseen:
    """What is foreseen of a loss.

    Args:
        tokens: number of training tokens.
        laws: losses of the published laws in nats per token.
        leverage: compute of a dense model of equal loss over that of this one.
        fitted: by the surface of a report; None without one.
    """

    tokens: float
    laws: tuple[Forecast, ...]
    leverage: Forecast
    fitted: FittedLoss | None = None

    @property
    def range(self) -> tuple[float, float] | None:
        """The lowest and the highest loss of the laws; None if none applies."""
        return loss_range(self.laws)


def expansion_of(shape: ModelShape) -> float:
    """Cells of all feed-forward layers over those that a token uses: E if all are sparse."""
    sffn, sparse = shape.sffn, shape.sparse_layers
    if sffn is None:
        return 1.0
    dense = shape.dense_layers * shape.ffn_hidden_size
    total = dense + shape.tables(sparse) * sffn.num_cells + sparse * sffn.shared_cells
    return total / (dense + sparse * sffn.active_cells)


def planned_model(shape: ModelShape, tokens: float) -> PlannedModel:
    """The model as the laws see it.

    Args:
        shape: shape of the model.
        tokens: number of training tokens.
    """
    parameters = count_parameters(shape)
    embeddings = embedding_parameters(shape)
    embeddings += 0 if shape.tied_embeddings else output_parameters(shape)
    return PlannedModel(
        hidden_size=shape.hidden_size,
        block_size=None if shape.sffn is None else shape.sffn.block_size,
        expansion=expansion_of(shape),
        parameters=parameters.total - embeddings,
        parameters_active=parameters.active,
        tokens=tokens,
        compute=3 * flops_per_token(shape).total * tokens,
    )


def foresee_loss(
    shape: ModelShape, tokens: float, surfaces: FittedSurfaces | None = None
) -> Foreseen:
    """What is foreseen for a model.

    Args:
        shape: shape of the model.
        tokens: number of training tokens.
        surfaces: those of a report.

    Raises:
        ConfigError: if the report has no surface for such a model.
    """
    model = planned_model(shape, tokens)
    return Foreseen(
        tokens=tokens,
        laws=loss_forecasts(model),
        leverage=leverage_forecast(model),
        fitted=None if surfaces is None else surfaces.foresee(model, shape.sffn),
    )
