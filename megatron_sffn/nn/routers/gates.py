"""The gate of a chosen block, a factor of its output: `--sffn-gate`.

Inputs: scores `[T, B]` and the ids `[T, K]` of the chosen blocks. Outputs: gates `[T, K]`.

A gate is a function of the score, and `-chosen` divides it by the sum over the chosen blocks. As in
Megatron, `sqrt-softplus` is sqrt(log(1 + exp(s))), and the sum gets 1e-20. The ReLU is not divided,
because all chosen blocks can have the gate 0.

Design notes: with an expert bias blocks are chosen by function plus bias, without the division,
as in DeepSeek-V3 (arXiv 2412.19437) and Megatron.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from megatron_sffn.nn.router_config import flag

CHOSEN = "-chosen"
EPSILON = 1e-20

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": lambda scores: scores.sigmoid(),
    "sqrt-softplus": lambda scores: F.softplus(scores).sqrt(),
    "softmax": lambda scores: scores.softmax(dim=-1),
    "relu": lambda scores: scores.relu(),
}
"""Name -> function of scores along their last dimension."""

GATES = ("none", *FUNCTIONS, *(f"{name}{CHOSEN}" for name in FUNCTIONS if name != "relu"))
"""Values of `--sffn-gate`."""


def gate_flag() -> Any:
    """The field `gate` of a router's config; None stands for the gate of the method's source."""
    return flag(
        "--sffn-gate",
        default=None,
        kind=str,
        choices=GATES,
        help="factor of a chosen block's output, from its score: none, a function of it, or that "
        "divided by its sum over the chosen blocks; by default as the method's paper has it "
        "(avg-k, vanilla-m, lorkm: none; switch: softmax; sigma-moe: sigmoid; peer: "
        "softmax-chosen; remoe: relu), any other is ours",
    )


def is_normalized(gate: str) -> bool:
    """True if the gates of a token's blocks add up to 1."""
    return gate.endswith(CHOSEN)


def factors_of_all(gate: str, scores: Tensor) -> Tensor:
    """The function of all scores `[T, B]`, before any division; of the gate `none` the scores."""
    function = FUNCTIONS.get(gate.removesuffix(CHOSEN))
    return scores if function is None else function(scores)


def gates_of(gate: str, scores: Tensor, ids: Tensor) -> Tensor | None:
    """The gates `[T, K]` of the chosen blocks; None for the gate `none`."""
    if gate == "none":
        return None
    if gate == "softmax":
        return factors_of_all(gate, scores).gather(1, ids)
    return gates_of_chosen(gate, scores.gather(1, ids))


def gates_of_chosen(gate: str, scores: Tensor) -> Tensor:
    """Gates that depend on the scores `[..., K]` of the chosen blocks alone."""
    factors = factors_of_all(gate, scores)
    if not is_normalized(gate) or gate == f"softmax{CHOSEN}":  # whose sum is 1
        return factors
    return factors / (factors.sum(dim=-1, keepdim=True) + EPSILON)
