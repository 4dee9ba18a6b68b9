"""Greedy and sampled tokens: with and without the cache, alone and in a batch, on every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_sffn.hf.export import export
from megatron_sffn.inference.generate import generate
from megatron_sffn.inference.sampling import Sampling
from tests.support.checkpoints import MODELS
from tests.support.slow import slow

TP2 = "--tensor-model-parallel-size 2"
PP2 = "--pipeline-model-parallel-size 2"
EP2 = "--expert-model-parallel-size 2"
PROMPTS = [[*b"def f(self, "], [*b"import os\nimport sys\n\nclass "], [*b"#"]]
GREEDY = Sampling(temperature=0, max_new_tokens=12, stops_at_eod=False)
SAMPLED = Sampling(temperature=0.8, top_k=50, top_p=0.95, seed=5, max_new_tokens=12)


def tokens_of(model: Any, sampling: Sampling, prompts: Any = PROMPTS, **options: Any) -> Any:
    made = generate(model, prompts, sampling, **options)
    return [continuation.tokens for continuation in made]


def batch_and_single(model: Any) -> dict[str, Any]:
    return {
        "cache": tokens_of(model, GREEDY),
        "no cache": [tokens_of(model, GREEDY, [p], use_cache=False)[0] for p in PROMPTS],
        "alone": [tokens_of(model, GREEDY, [p])[0] for p in PROMPTS],
        "sampled": tokens_of(model, SAMPLED),
        "sampled alone": [tokens_of(model, SAMPLED, [p])[0] for p in PROMPTS],
    }


def batch(model: Any) -> dict[str, Any]:
    return {"cache": tokens_of(model, GREEDY), "sampled": tokens_of(model, SAMPLED)}


NOT_EXPORTED = ("latent", "n-grams", "one-table")
LAYOUTS = [
    ("avg-k", 2, EP2),
    ("rand-hash", 4, f"{TP2} {PP2} {EP2}"),
    *(
        slow(router, ranks, layout)
        for router in MODELS
        for ranks, layout in ((2, TP2), (2, PP2), (2, EP2), (4, f"{TP2} {PP2} {EP2}"))
        if not (router == "dense" and EP2 in layout)
        and not (router == "one-table" and PP2 in layout)  # of both layers
    ),
    slow("avg-k", 2, f"{TP2} --expert-tensor-parallel-size 2"),
    slow("dense", 4, f"{TP2} {PP2}"),
]


@pytest.mark.parametrize("router", [slow(name) if name == "one-table" else name for name in MODELS])
def test_the_cache_and_the_batch_do_not_change_the_tokens(use, trained, router: str) -> None:
    made = use(trained(router), batch_and_single)
    assert made["cache"] == made["no cache"] == made["alone"]
    assert made["sampled"] == made["sampled alone"] != made["cache"]
    assert len({tuple(tokens) for tokens in made["cache"]}) > 1, "prompts make a difference"


@pytest.mark.parametrize(("router", "ranks", "layout"), LAYOUTS)
def test_every_layout_generates_the_same_tokens(
    use, trained, router: str, ranks: int, layout: str
) -> None:
    alone = use(trained(router), batch)
    assert use(trained(router), batch, layout, ranks) == alone


def test_seeds_stops_and_limits(use, trained) -> None:
    def made(model: Any) -> dict[str, Any]:
        base = dict(temperature=1.0, max_new_tokens=12)
        greedy = tokens_of(model, GREEDY, PROMPTS[:1])[0]
        seen: list[tuple[int, int]] = []
        ended = generate(
            model,
            PROMPTS[:2],
            GREEDY,
            limits=[3, 12],
            on_token=lambda number, token: seen.append((number, token)),
            is_end=lambda number, tokens: number == 1 and len(tokens) == 5,
        )
        return {
            "seeds": [tokens_of(model, Sampling(seed=s, **base), PROMPTS[:1]) for s in (1, 1, 2)],
            "top 1": tokens_of(model, Sampling(top_k=1, **base), PROMPTS[:1])[0] == greedy,
            "top p": tokens_of(model, Sampling(top_p=1e-9, **base), PROMPTS[:1])[0] == greedy,
            "ended": [(len(c.tokens), c.finish_reason) for c in ended],
            "streamed": [[t for n, t in seen if n == number] for number in (0, 1)]
            == [c.tokens for c in ended],
        }

    result = use(trained("avg-k"), made)
    first, again, other = result["seeds"]
    assert first == again != other
    assert result["top 1"] and result["top p"] and result["streamed"]
    assert result["ended"] == [(3, "length"), (5, "stop")]


def test_the_end_of_a_document_ends_the_text(use, trained) -> None:
    def made(model: Any) -> Any:
        greedy = tokens_of(model, GREEDY, PROMPTS[:1])[0]
        object.__setattr__(model, "eod", greedy[4])  # the fifth token means the end
        stopped = generate(model, PROMPTS[:1], Sampling(temperature=0, max_new_tokens=12))[0]
        return greedy, greedy.index(greedy[4]), stopped.tokens, stopped.finish_reason

    greedy, end, tokens, reason = use(trained("avg-k"), made)
    assert tokens == greedy[:end]
    assert reason == "stop"


@pytest.mark.parametrize("router", [name for name in MODELS if name not in NOT_EXPORTED])
def test_the_export_generates_the_same_tokens(use, trained, router: str, tmp_path: Path) -> None:
    expected = use(trained(router), batch)["cache"]
    export(trained(router), tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for prompt, tokens in zip(PROMPTS, expected, strict=True):
        ids = model.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None
        )
        assert ids[0, len(prompt) :].tolist() == tokens
