"""Text generation with a KV cache, for a batch of prompts, on any layout.

Inputs: a loaded model and prompts. Outputs: continuations, token by token.

Design notes:
- The keys and values are kept in Megatron's `StaticInferenceContext`, which its attention fills.
- A batch is read together up to the end of its shortest prompt. The remaining tokens of longer
  prompts are read one by one, while the shorter ones are continued, as in Megatron's own loop: no
  padding takes part in attention or routing, so a prompt has the same continuation in every batch.
- One rank chooses the tokens, and all others receive them. Megatron's `TextGenerationController`
  sends the logits to all ranks, asserts that they are on a GPU, and refuses top-k with top-p. Its
  dynamic engine stores keys and values with kernels for a GPU and has no way to give input ids to
  RandHash. docs/generation.md has what was tried.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_sffn.inference.sampling import Sampling, next_token
from megatron_sffn.nn.layer_pattern import recurrent_layers

if TYPE_CHECKING:
    from megatron_sffn.inference.model import InferenceModel

OnToken = Callable[[int, int], None]
"""Called with the number of the prompt and its next token."""

IsEnd = Callable[[int, list[int]], bool]
"""Called with the number of the prompt and its new tokens."""


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """What was generated for a prompt.

    Args:
        tokens: ids, without the end of the document.
        finish_reason: `stop` at the end of the document, `length` at the limit.
    """

    tokens: list[int]
    finish_reason: str


def generate(
    model: InferenceModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    limits: Sequence[int] | None = None,
    use_cache: bool = True,
    on_token: OnToken | None = None,
    is_end: IsEnd = lambda number, tokens: False,
) -> list[Continuation]:
    """Continue a batch of prompts; all ranks call it together.

    Args:
        model: the loaded model.
        prompts: ids of each prompt, at least one.
        sampling: how tokens are chosen.
        limits: new tokens of each prompt; None for `sampling.max_new_tokens` of all.
        use_cache: False computes all tokens again for each new one, as a check of the cache. So
            does a model with recurrent layers, whose states are not kept.
        on_token: called for every new token, in order.
        is_end: whether a continuation ends with its last token; the same on all ranks.
    """
    from megatron.core.inference.contexts import StaticInferenceContext
    from megatron.core.inference.utils import InferenceMode

    use_cache = use_cache and not recurrent_layers(model.args.hybrid_layer_pattern or "")
    lengths = [len(prompt) for prompt in prompts]
    limits = limits or [sampling.max_new_tokens] * len(prompts)
    total = max(length + limit for length, limit in zip(lengths, limits, strict=True))
    tokens = torch.zeros(len(prompts), total, dtype=torch.long)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    cache = StaticInferenceContext(len(prompts), total) if use_cache else None
    generators = [sampling.generator() for _ in prompts]
    generated: list[list[int]] = [[] for _ in prompts]
    reasons: list[str | None] = [None] * len(prompts)
    start, end = 0, min(lengths)
    # Without a cache, layers compute as in an evaluation.
    with InferenceMode.active() if use_cache else contextlib.nullcontext():
        while None in reasons:
            first = start if use_cache else 0
            logits = model.forward(tokens[:, :end], start=first, cache=cache)
            active = [
                length <= end and reason is None
                for length, reason in zip(lengths, reasons, strict=True)
            ]
            chosen = _choose(model, logits, active, sampling, generators)
            for number in torch.tensor(active).nonzero().flatten().tolist():
                token = chosen[number]
                if token == model.eod and sampling.stops_at_eod:
                    reasons[number] = "stop"
                    continue
                tokens[number, end] = token
                generated[number].append(token)
                if on_token is not None:
                    on_token(number, token)
                if is_end(number, generated[number]):
                    reasons[number] = "stop"
                elif len(generated[number]) == limits[number]:
                    reasons[number] = "length"
            start, end = end, end + 1
    return [
        Continuation(tokens=new_tokens, finish_reason=str(reason))
        for new_tokens, reason in zip(generated, reasons, strict=True)
    ]


def _choose(
    model: InferenceModel,
    logits: Tensor | None,
    active: list[bool],
    sampling: Sampling,
    generators: list[torch.Generator],
) -> list[int]:
    """The next token of every sequence, on all ranks; 0 where a sequence is not active."""
    # Megatron numbers the ranks of a pipeline stage consecutively.
    num_stages = model.args.pipeline_model_parallel_size
    world_size = torch.distributed.get_world_size()
    source = world_size // num_stages * (num_stages - 1)
    chosen = torch.zeros(len(active), dtype=torch.long)
    if torch.distributed.get_rank() == source:
        assert logits is not None, "the last stage has the logits"
        for number, logits_V in enumerate(logits[:, -1, : model.vocab_size]):
            if active[number]:
                chosen[number] = next_token(logits_V, sampling, generators[number])
    if world_size > 1:
        chosen = chosen.to(torch.cuda.current_device())
        torch.distributed.broadcast(chosen, src=source)
    tokens: list[int] = chosen.tolist()
    return tokens
