"""The next token from its logits: greedy, or drawn with temperature, top-k and top-p.

Design notes: the draw inverts the cumulative distribution at one uniform number from a generator on
the CPU. So a seed gives the same text on a CPU, on a GPU and on every layout, but for logits that
differ by rounding, and a prompt has the same continuation alone and in a batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sffn.checks.problem import Problem, run_checks


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How continuations are drawn.

    Args:
        temperature: divides the logits; 0 always takes the likeliest token (greedy).
        top_k: only the k likeliest tokens can be drawn; 0 for all.
        top_p: only the likeliest tokens can be drawn whose probabilities add up to p, and always
            the likeliest; 1 for all. The probabilities are those after `top_k`.
        seed: of every prompt's generator.
        max_new_tokens: tokens of a continuation.
        stops_at_eod: whether the end-of-document token ends a continuation.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 1234
    max_new_tokens: int = 128
    stops_at_eod: bool = True

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        run_checks((_ranges,), self)

    def generator(self) -> torch.Generator:
        """A new generator for one prompt."""
        return torch.Generator().manual_seed(self.seed)


def _ranges(sampling: Sampling) -> Iterator[Problem]:
    """Numbers that no distribution has."""
    temperature, top_p = sampling.temperature, sampling.top_p
    if not 0 <= temperature < math.inf:
        rule = "is not a finite number of at least 0"
        yield Problem("--temperature", temperature, rule, "give one; 0 is greedy")
    if sampling.top_k < 0:
        yield Problem("--top-k", sampling.top_k, "is less than 0", "0 lets all tokens be drawn")
    if not 0 < top_p <= 1:
        rule = "is not greater than 0 and at most 1"
        yield Problem("--top-p", top_p, rule, "1 lets all tokens be drawn")
    if sampling.max_new_tokens < 1:
        count = sampling.max_new_tokens
        yield Problem("--max-new-tokens", count, "must be at least 1", "give a positive number")


def next_token(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Choose one token.

    Args:
        logits_V: `[V]`, of the tokens that may be chosen.
        sampling: how.
        generator: of the prompt; one number is drawn from it unless the choice is greedy.
    """
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    logits_V = logits_V.cpu().double() / sampling.temperature
    sorted_logits, ids = logits_V.sort(descending=True, stable=True)
    if sampling.top_k:
        sorted_logits, ids = sorted_logits[: sampling.top_k], ids[: sampling.top_k]
    probabilities = sorted_logits.softmax(dim=0)
    cumulative = probabilities.cumsum(dim=0)
    if sampling.top_p < 1:
        # A token stays if those before it have not reached p.
        count = int((cumulative - probabilities < sampling.top_p).sum())
        cumulative = cumulative[:count]
    drawn = torch.rand(1, generator=generator, dtype=torch.float64) * cumulative[-1]
    place = int(torch.searchsorted(cumulative, drawn, right=True))
    return int(ids[min(place, len(cumulative) - 1)])
