"""Checkpoints and their exports compute the same logits."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import megatron_sffn.hf  # noqa: F401 (tells transformers about our class)
from megatron_sffn.hf.export import export
from megatron_sffn.nn.routers import ROUTERS
from tests.support.megatron_models import Saved, flags_of, save_models

ACTIVATIONS = ["", "--sffn-relu", "--squared-relu", "--swiglu"]
NORMS = ["", "--normalization RMSNorm"]
TIED = ["", "--untie-embeddings-and-output-weights"]
GROUPED = ["", "--group-query-attention --num-query-groups 2"]
SPARSE = [name for name in ROUTERS if name != "dense"]


def combinations() -> list[tuple[str, ...]]:
    """Every router, activation, norm, output layer and attention that are possible."""
    choices = itertools.product([*SPARSE, "dense"], ACTIVATIONS, NORMS, TIED, GROUPED)
    return [choice for choice in choices if choice[:2] != ("pkm-ffn", "--swiglu")]


def pairwise() -> list[tuple[str, ...]]:
    """A few of the combinations that have every pair of values."""
    missing = {pair for choice in combinations() for pair in pairs_of(choice)}
    chosen = []
    while missing:
        best = max(combinations(), key=lambda choice: len(pairs_of(choice) & missing))
        chosen.append(best)
        missing -= pairs_of(best)
    return chosen


def pairs_of(choice: tuple[str, ...]) -> set[tuple[tuple[int, str], ...]]:
    """The pairs of values in a combination."""
    return set(itertools.combinations(enumerate(choice), 2))


def check_equal(saved: Saved, output: Path, **options: str) -> None:
    """Export, load with transformers, and compare the logits with Megatron's."""
    export(saved.load, output, **options)
    model = AutoModelForCausalLM.from_pretrained(output)
    with torch.no_grad():
        logits = model(saved.ids).logits
    torch.testing.assert_close(logits, saved.logits, rtol=1e-5, atol=1e-5)


def check_all(choices: list[tuple[str, ...]], tmp_path: Path) -> None:
    flags = [" ".join([flags_of(router), *rest]) for router, *rest in choices]
    for saved, text in zip(save_models(tmp_path, flags), flags, strict=True):
        try:
            check_equal(saved, tmp_path / "hf" / saved.load.name, architecture="sparse_ffn")
        except Exception as error:
            raise AssertionError(text) from error


def test_our_class_computes_what_megatron_computes_for_every_pair_of_settings(
    tmp_path: Path,
) -> None:
    check_all(pairwise(), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("router", [*SPARSE, "dense"])
def test_our_class_computes_what_megatron_computes_for_all_settings(
    router: str, tmp_path: Path
) -> None:
    check_all([choice for choice in combinations() if choice[0] == router], tmp_path)
