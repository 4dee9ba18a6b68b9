"""Foreseen collectives of tensor parallelism are those that Megatron's layers call."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_sffn.accounting import ModelShape, TrainingSetup, layer_parts
from megatron_sffn.accounting.shape import count_parts
from megatron_sffn.nn.parallel_layout import ParallelLayout
from megatron_sffn.planning.tensor_collectives import Collectives, collectives_of
from megatron_sffn.planning.workload import Workload
from tests.accounting.models import LATENT, SMALL, batch, build
from tests.support.ranks import run_ranks

SAMPLES = 2
LAYOUT = ParallelLayout(world_size=2, tp=2, sequence_parallel=True)
NORMED = {"qk_layernorm": True, "layernorm": False}
MODELS: dict[str, dict[str, Any]] = {
    "attention": {},
    "latent attention": {"latent_attention": LATENT, **NORMED},
    "queries without latents": {"latent_attention": dataclasses.replace(LATENT, q_lora_rank=None)},
    "prediction": {"predicted_tokens": 1, "prediction": "*-"},
}
ENDS = Collectives(7, 5 * SMALL.hidden_size + 2 * LAYOUT.tp)
"""What a prediction gathers beside its projection and layer, and no plan counts: five times hidden
states for embedding and logits, and the best token of each rank for the logged acceptance rate."""


class _Counter(TorchDispatchMode):
    """Counts gathers and reduce-scatters, and the numbers of the whole tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.numbers = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name.startswith("c10d::") and ("gather" in name or "reduce_scatter" in name):
            self.calls += 1
            whole = args[0] if "gather" in name else args[1]
            self.numbers += sum(t.numel() for t in _flat(whole))
        return func(*args, **(kwargs or {}))


def _flat(tensors: Any) -> list[torch.Tensor]:
    if isinstance(tensors, torch.Tensor):
        return [tensors]
    return [tensor for item in tensors for tensor in _flat(item)]


def counted(shapes: list[ModelShape]) -> list[tuple[int, int]]:
    """Collectives of a step of each model on this rank."""
    warnings.simplefilter("ignore")
    counts = []
    for shape in shapes:
        model = build(shape, **LAYOUT.megatron_sizes(), sequence_parallel=True)
        arguments, kwargs = batch(shape, SAMPLES)
        with _Counter() as counter:
            model(*arguments, **kwargs, labels=arguments[0]).sum().backward()
        counts.append((counter.calls, counter.numbers))
    return counts


def test_layers_call_the_foreseen_collectives() -> None:
    shallow = [dataclasses.replace(SMALL, num_layers=1, **MODELS[name]) for name in MODELS]
    deep = [dataclasses.replace(shape, num_layers=2) for shape in shallow]
    # A prediction less in place of a layer less.
    shallow[-1] = dataclasses.replace(deep[-1], predicted_tokens=0, prediction="")
    (ranks, _) = run_ranks(2, counted, [*shallow, *deep], **LAYOUT.megatron_sizes())
    for index, (name, shape) in enumerate(zip(MODELS, deep, strict=True)):
        setup = TrainingSetup(micro_batch_size=SAMPLES)
        parts = layer_parts(shape, None)
        run = Workload(shape=shape, parts=parts, layout=LAYOUT, setup=setup)
        foreseen = collectives_of(run, count_parts("*-"), shape.predicted_tokens)
        if shape.predicted_tokens:
            foreseen = foreseen.plus(ENDS)
        calls, numbers = (
            with_layer - without
            for with_layer, without in zip(ranks[len(MODELS) + index], ranks[index], strict=True)
        )
        assert (calls, numbers / run.tokens) == foreseen, name


@pytest.mark.parametrize(("recompute", "passes"), [(None, 5), ("full", 7)])
def test_full_recomputation_repeats_the_forward_collectives(
    recompute: str | None, passes: int
) -> None:
    run = Workload(
        shape=SMALL,
        parts=("*-",),
        layout=LAYOUT,
        setup=TrainingSetup(recompute=recompute),
    )
    count = 2 * passes
    assert collectives_of(run, count_parts("*-")) == (count, count * SMALL.hidden_size)
