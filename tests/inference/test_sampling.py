"""The distribution that tokens are drawn from."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from megatron_sffn.inference.sampling import Sampling, next_token
from megatron_sffn.utils.errors import ConfigError

LOGITS = torch.tensor([0.5, 0.1, 0.25, 0.15]).log()


def frequencies(sampling: Sampling, count: int = 4000) -> list[float]:
    generator = sampling.generator()
    drawn = Counter(next_token(LOGITS, sampling, generator) for _ in range(count))
    return [drawn[token] / count for token in range(len(LOGITS))]


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), [0.5, 0.1, 0.25, 0.15]),
        (Sampling(top_k=2), [2 / 3, 0, 1 / 3, 0]),
        (Sampling(top_k=9), [0.5, 0.1, 0.25, 0.15]),
        (Sampling(top_p=0.6), [2 / 3, 0, 1 / 3, 0]),
        (Sampling(top_p=0.4), [1, 0, 0, 0]),
        # Of the three likeliest, 0.56 and 0.28 are more than 0.8.
        (Sampling(top_k=3, top_p=0.8), [2 / 3, 0, 1 / 3, 0]),
        (Sampling(temperature=0.5), [0.25 / 0.345, 0.01 / 0.345, 0.0625 / 0.345, 0.0225 / 0.345]),
        (Sampling(temperature=0), [1, 0, 0, 0]),
    ],
)
def test_frequencies_are_the_probabilities(sampling: Sampling, expected: list[float]) -> None:
    assert frequencies(sampling) == pytest.approx(expected, abs=0.03)


def test_transformers_filters_leave_the_same_tokens() -> None:
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(1, 200, generator=torch.Generator().manual_seed(0)) * 3
    for top_k, top_p in ((0, 0.5), (20, 1.0), (20, 0.7)):
        filtered = logits
        if top_k:
            filtered = TopKLogitsWarper(top_k)(None, filtered)
        if top_p < 1:
            filtered = TopPLogitsWarper(top_p)(None, filtered)
        sampling = Sampling(top_k=top_k, top_p=top_p)
        generator = sampling.generator()
        drawn = {next_token(logits[0], sampling, generator) for _ in range(3000)}
        allowed = set(filtered[0].isfinite().nonzero().flatten().tolist())
        assert drawn <= allowed
        assert len(drawn) > len(allowed) / 2


@pytest.mark.parametrize(
    ("field", "value", "flag"),
    [
        ("temperature", -1.0, "--temperature -1.0"),
        ("temperature", float("nan"), "--temperature nan"),
        ("top_k", -1, "--top-k -1"),
        ("top_p", 0.0, "--top-p 0.0"),
        ("top_p", 1.5, "--top-p 1.5"),
        ("max_new_tokens", 0, "--max-new-tokens 0"),
    ],
)
def test_numbers_that_no_distribution_has_are_refused(field: str, value: float, flag: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{flag} .*; "):
        Sampling(**{field: value})
