"""Published scaling laws of dense and sparse models, in our letters g, E and k.

Inputs: sizes of a model and of its training. Outputs: losses in nats per token, a compute leverage,
or a learning rate.

Design notes: each law was fitted to other data, tokenizers and models than a user's. Its slope can
be compared with ours, its level cannot.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


def granularity(hidden_size: int, block_size: float) -> float:
    """Krajewski's G, 4d / g: how many blocks have the size of a dense FFN."""
    return 4 * hidden_size / block_size


def _expert_count(experts: float, start: float, largest: float) -> float:
    """A number that saturates at both ends, Clark 2022 (arXiv 2202.01169): 1 gives `start`."""
    shift = 1 / (1 / start - 1 / largest)
    return 1 / (1 / (experts - 1 + shift) + 1 / largest)


@dataclass(frozen=True, kw_only=True)
class Krajewski:
    """Loss of Krajewski 2024 (arXiv 2402.07871, Table 1): c + (g/G^γ + a)/N^α + b/D^β.

    Args:
        a: factor of the size.
        alpha: exponent of the size.
        b: factor of the tokens.
        beta: exponent of the tokens.
        c: loss of an infinite model in nats per token.
        g: factor of the granularity; 0 for a dense model.
        gamma: exponent of the granularity.
    """

    a: float
    alpha: float
    b: float
    beta: float
    c: float = 0.47
    g: float = 0.0
    gamma: float = 0.0

    def loss(self, *, parameters: float, tokens: float, granularity: float = 1.0) -> float:
        """The loss in nats per token.

        Args:
            parameters: all parameters but those of the embeddings, active or not.
            tokens: number of training tokens.
            granularity: G = 4d / g.
        """
        size = (self.g / granularity**self.gamma + self.a) / parameters**self.alpha
        return self.c + size + self.b / tokens**self.beta


KRAJEWSKI_SPARSE = Krajewski(a=18.1, alpha=0.115, b=30.8, beta=0.147, g=2.1, gamma=0.58)
"""For an expansion of 64, the only one that they trained."""
KRAJEWSKI_DENSE = Krajewski(a=16.3, alpha=0.126, b=26.7, beta=0.127)


def ling_leverage(
    *, expansion: float, block_size: float, hidden_size: float, compute: float
) -> float:
    """Efficiency leverage of Ling 2025 (arXiv 2507.17702, Table 2).

    It is the compute of a dense model over that of a sparse model with the same loss:
    EL = Â^(α + γ log²G + β log G), with α = a + d·log C.

    Args:
        expansion: E; the share of active cells is A = 1/E.
        block_size: g in cells; their granularity is G = 2d / g, with a logarithm to base 2.
        hidden_size: d.
        compute: C, FLOPs of the training, with a logarithm to base 10.
    """
    share = 1 / expansion
    start, largest = 1.63e-2, 5.28e16
    share = 1 / (1 / (share + 1 / (1 / start - 1 / largest)) + 1 / largest)
    log_granularity = math.log2(2 * hidden_size / block_size)
    exponent = 1.23 - 7.61e-2 * math.log10(compute)
    exponent += 1.67e-2 * log_granularity**2 - 1.17e-1 * log_granularity
    return float(share**exponent)


def ludziejewski_loss(*, expansion: float, parameters_active: float, tokens: float) -> float:
    """Loss of Ludziejewski 2025 (arXiv 2502.05172, Table 3) in nats per token.

    L = a Ê^δ N^(α + γ ln Ê) + b Ê^ω D^(β + ζ ln Ê) + c; it does not depend on g.

    Args:
        expansion: E, their number of experts; 1 is a dense model.
        parameters_active: N, parameters that one token uses.
        tokens: D, number of training tokens.
    """
    experts = _expert_count(expansion, start=2.0732, largest=290.4521)
    log_experts = math.log(experts)
    size = 35.91 * experts**-0.2285 * parameters_active ** (-0.1889 + 0.0098 * log_experts)
    data = 35.98 * experts**0.5529 * tokens ** (-0.1775 - 0.0259 * log_experts)
    return float(size + data + 1.3637)


MARIN_ASYMPTOTE, MARIN_FACTOR, MARIN_EXPONENT = 1.6, 95.18, 0.0941
"""Loss of marin's grug-moe on Paloma: 1.6 + 95.18 · C^-0.0941."""


def marin_loss(*, compute: float) -> float:
    """Loss of marin's grug-moe models on Paloma in nats per token.

    Args:
        compute: FLOPs of the training.
    """
    return MARIN_ASYMPTOTE + MARIN_FACTOR * compute**-MARIN_EXPONENT


def marin_learning_rate(*, tokens: float, hidden_size: float, batch: float) -> float:
    """Learning rate of Adam in marin's grug-moe models.

    Args:
        tokens: number of training tokens.
        hidden_size: d.
        batch: size of the batch, in marin's unit.
    """
    return float(1.63 * tokens**-0.2813 * hidden_size**-0.3678 * math.sqrt(batch))
