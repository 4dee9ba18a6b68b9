"""Compare two layers on the same tokens and weights: outputs and every gradient.

A reference is given as a function of the tokens and its weights as leaves in our layout: keys
`[B, G, D]` (`[B, 2G, D]` with the gate keys first, for a gated activation), values `[B, G, D]`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tests.support.router_cases import inputs, tables


def weights_of(layer: Any) -> dict[str, Tensor]:
    """The weights of one of our layers, by short names: keys, values, and the router's weights."""
    return tables(layer) | dict(layer.router.named_parameters())


def copies_of(layer: Any) -> dict[str, Tensor]:
    """Copies of the weights of `weights_of` as leaves, for a formula."""
    return {
        name: weight.detach().clone().requires_grad_() for name, weight in weights_of(layer).items()
    }


def outcome(
    forward: Callable[[Tensor], Tensor], weights: Callable[[], Mapping[str, Tensor | None]]
) -> dict[str, Tensor]:
    """Output, gradient of the tokens, and gradients of the weights, for one fixed loss.

    Args:
        forward: `[S, BATCH, D]` to the same; an auxiliary loss is attached to the output, or
            `forward` differentiates it.
        weights: called after the backward pass: name -> gradient in our layout.
    """
    hidden, _, factors = inputs()
    x = hidden.clone().requires_grad_()
    y = forward(x)
    (y * factors).sum().backward()
    assert x.grad is not None
    gradients = {name: grad for name, grad in weights().items() if grad is not None}
    return {"output": y.detach(), "gradient of tokens": x.grad, **gradients}


def sffn_outcome(layer: Any, ids: Tensor | None = None) -> dict[str, Tensor]:
    """`outcome` of one of our layers."""

    def gradients() -> dict[str, Tensor | None]:
        return {name: weight.grad for name, weight in weights_of(layer).items()}

    return outcome(lambda x: layer(x, padding_mask=ids)[0], gradients)


def formula(
    forward: Callable[..., Tensor | tuple[Tensor, Tensor]], weights: dict[str, Tensor]
) -> dict[str, Tensor]:
    """`outcome` of a formula.

    Args:
        forward: tokens `[T, D]` and the weights by name to outputs `[T, D]`, or to outputs and a
            loss that is added.
        weights: leaves, from `copies_of`.
    """

    def run(x: Tensor) -> Tensor:
        result = forward(x.flatten(0, 1), **weights)
        if isinstance(result, tuple):
            result, loss = result
            loss.backward(retain_graph=True)
        return result.view_as(x)

    return outcome(run, lambda: {name: weight.grad for name, weight in weights.items()})


def assert_same(
    actual: Mapping[str, Tensor], reference: Mapping[str, Tensor], *, tolerance: float = 1e-10
) -> None:
    """All tensors agree, and none of them is zero."""
    assert actual.keys() == reference.keys()
    for name, value in reference.items():
        assert value.abs().max() > 1e-6, name
        torch.testing.assert_close(
            actual[name],
            value,
            rtol=tolerance,
            atol=tolerance * float(value.abs().max()),
            msg=lambda text, name=name: f"{name}: {text}",
        )
