"""Gradients that the backward pass of `block_ffn` adds to Megatron's `main_grad`."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import pytest
import torch

from megatron_sffn.ops.block_ffn import main_grad
from tests.support.engine import Layout, Variant, build, forward, local_shards, samples
from tests.support.ranks import run_ranks

VARIANTS = {
    "avg-k without a gate": Variant("avg-k"),
    "avg-k with a gate": Variant("avg-k", options=(("gate", "sigmoid"),)),
    "vanilla-m": Variant("vanilla-m"),
    "pkm": Variant("pkm"),
    "in chunks": Variant("switch", sffn=(("exchange_chunks", 3),)),
    "pkm in chunks": Variant("pkm", sffn=(("exchange_chunks", 3),)),
}
"""Keys that the router does not differentiate, keys that it differentiates, values without keys,
and tables that are used once per chunk of a microbatch."""

LAYOUTS = {
    "one rank": Layout(dtype=torch.float32),
    "one rank, full recomputation": Layout(dtype=torch.float32, recompute="full"),
    "EP2": Layout(world_size=2, ep=2, dtype=torch.float32),
    "DP2, overlapped": Layout(world_size=2, distributed_optimizer=True, dtype=torch.float32),
}


def gradients(layout: Layout, *, direct: bool) -> list[dict[str, Any]]:
    """Gradients of a step of several microbatches, and the marks on the tables, per variant."""
    warnings.simplefilter("ignore")  # Megatron warns about its experimental models
    if not direct:
        main_grad.buffer_of = lambda table: None
    return [_step(variant, layout) for variant in VARIANTS.values()]


def _step(variant: Variant, layout: Layout) -> dict[str, Any]:
    (chunk,) = build(variant, layout)
    chunk.zero_grad_buffer()
    batches = list(samples(0))
    for number, batch in enumerate(batches):
        run = partial(_microbatch, chunk, batch)
        if number == len(batches) - 1:
            run()
        else:
            with chunk.no_sync():
                run()
    chunk.finish_grad_sync()
    tables = {n: p for n, p in chunk.named_parameters() if n.endswith(("experts.keys", "values"))}
    marked = {name for name, table in tables.items() if table.grad_added_to_main_grad}
    return {
        "grads": local_shards([chunk], "main_grad"),
        "tables": set(tables),
        "marked": marked,
        "remaining": [name for name, weight in chunk.named_parameters() if weight.grad is not None],
    }


def _microbatch(chunk: Any, batch: Any) -> None:
    logits, loss_of = forward(0, iter([batch]), chunk)
    loss_of(logits)[0].backward()


@pytest.mark.parametrize("name", LAYOUTS)
def test_adding_to_main_grad_gives_the_gradients_of_autograd(name: str) -> None:
    layout = LAYOUTS[name]
    direct, autograd = (
        run_ranks(
            layout.world_size,
            partial(gradients, layout, direct=is_direct),
            **layout.megatron_sizes(),
        )
        for is_direct in (True, False)
    )
    for rank_direct, rank_autograd in zip(direct, autograd, strict=True):
        for variant, actual, reference in zip(VARIANTS, rank_direct, rank_autograd, strict=True):
            assert actual["marked"] == actual["tables"] != set(), variant
            assert not reference["marked"]
            assert not actual["remaining"], "a gradient outlived its microbatch"
            for (weight, *_, grad), (*_, expected) in zip(
                actual["grads"], reference["grads"], strict=True
            ):
                error = (grad - expected).norm() / expected.norm()
                assert error < 1e-6, f"{variant}, {weight}: {error:.1e}"
