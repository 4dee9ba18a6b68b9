"""The summary of a run: step times, losses, and `summary.json`."""

from __future__ import annotations

import json
import math
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sffn.accounting import ModelShape, count_parameters, flops_per_token
from megatron_sffn.nn.config import SparseFFNConfig
from megatron_sffn.nn.routers import ROUTERS
from megatron_sffn.train import summary
from megatron_sffn.train.run_description import SECTIONS, describe_run
from megatron_sffn.train.summary import RunSummary
from tests.support.ranks import run_ranks

SFFN = SparseFFNConfig(router=ROUTERS["avg-k"](), active_cells=8, block_size=2, expansion=2)


def arguments(**changes: Any) -> Namespace:
    """Megatron's namespace in the middle of a run."""
    values = {
        **{name: None for names in SECTIONS.values() for name in names},
        "sffn_command": ["--seed", "11"],
        "curr_iteration": 0,
        "iteration": 0,
        "skip_train": False,
        "full_validation": False,
        "validation_set_names": None,
        "consumed_train_samples": 0,
        "global_batch_size": 4,
        "seq_length": 16,
        "num_experts": SFFN.num_blocks,
        "num_layers": 3,
        "sffn_router": "avg-k",
        "ffn_hidden_size": 8,
        "world_size": 8,
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 1,
        "expert_model_parallel_size": 4,
        "expert_tensor_parallel_size": 1,
        "context_parallel_size": 1,
        "data_parallel_size": 4,
        "seed": 11,
    }
    return Namespace(**values | changes)


def shape(sffn: SparseFFNConfig | None = SFFN) -> ModelShape:
    return ModelShape(
        num_layers=3,
        hidden_size=6,
        ffn_hidden_size=8,
        num_attention_heads=2,
        kv_channels=3,
        seq_length=16,
        padded_vocab_size=32,
        sparse_layers=0 if sffn is None else 2,
        sffn=sffn,
    )


# Time


class Clock:
    """Stands in for the time."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake_clock = Clock()
    monkeypatch.setattr(summary.time, "perf_counter", fake_clock)
    return fake_clock


def step(
    run_summary: RunSummary, clock: Clock, seconds: float, samples: int = 4, microbatches: int = 3
) -> None:
    """A training step: its microbatches at the start, the optimizer at the end."""
    for _ in range(microbatches):
        run_summary.before_forward(True)
        clock.now += seconds / microbatches
    run_summary.after_step([], microbatches)
    run_summary.args.consumed_train_samples += samples
    run_summary.args.curr_iteration += 1


def test_a_step_lasts_from_its_first_microbatch_to_the_next_steps(
    clock: Clock, tmp_path: Path
) -> None:
    run_summary = RunSummary(arguments(num_experts=None), tmp_path)
    for seconds in (8.0, 2.0, 4.0, 1.0):
        step(run_summary, clock, seconds)
    # A step ends when the next begins, so the last step has no rate yet.
    assert run_summary.samples_per_second == pytest.approx([4 / 8.0, 4 / 2.0, 4 / 4.0])


def test_the_rate_counts_the_samples_of_each_step(clock: Clock, tmp_path: Path) -> None:
    run_summary = RunSummary(arguments(num_experts=None), tmp_path)
    for samples in (2, 4, 8, 8):  # as under --step-batch-size-schedule
        step(run_summary, clock, 2.0, samples)
    assert run_summary.samples_per_second == pytest.approx([1.0, 2.0, 4.0])
    assert run_summary.summary(shape(None))["iterations"] == 4


def test_an_evaluation_belongs_to_no_step(clock: Clock, tmp_path: Path) -> None:
    run_summary = RunSummary(arguments(num_experts=None), tmp_path)
    step(run_summary, clock, 2.0)
    step(run_summary, clock, 3.0)
    for _ in range(4):
        run_summary.before_forward(False)
        clock.now += 50.0
    step(run_summary, clock, 4.0)
    step(run_summary, clock, 5.0)
    assert run_summary.samples_per_second == pytest.approx([4 / 2.0, 4 / 4.0])


# Evaluations


def evaluate(
    run_summary: RunSummary, iteration: int, *sets: list[float], is_test: bool = False
) -> None:
    """An evaluation of microbatches with these mean losses, over 1, 2, 3, ... tokens."""
    run_summary.evaluations.begin(iteration, is_test=is_test)
    for losses in sets:
        for tokens, loss in enumerate(losses, start=1):
            run_summary.evaluations.add(torch.tensor([loss * tokens, tokens]))
        run_summary.after_evaluation([])


def curve(run_summary: RunSummary) -> list[list[float]]:
    return run_summary.evaluations.summary()["validation_curve"]


def test_the_loss_is_the_mean_over_tokens_of_one_evaluation(one_rank: None, tmp_path: Path) -> None:
    run_summary = RunSummary(arguments(num_experts=None), tmp_path)
    evaluate(run_summary, 10, [6.0, 3.0])
    evaluate(run_summary, 20, [2.0])
    assert curve(run_summary) == [[10, (6 + 2 * 3) / 3], [20, 2.0]]


def loss_of_two_ranks(shares: list[list[float]], folder: str) -> float:
    run_summary = RunSummary(arguments(num_experts=None), Path(folder))
    run_summary.evaluations.begin(1, is_test=False)
    run_summary.evaluations.add(torch.tensor(shares[torch.distributed.get_rank()]))
    run_summary.after_evaluation([])
    return run_summary.evaluations.validations[0].loss


def test_the_loss_is_that_of_all_ranks(tmp_path: Path) -> None:
    assert run_ranks(2, loss_of_two_ranks, [[8.0, 2.0], [1.0, 1.0]], str(tmp_path)) == [3.0, 3.0]
    # The first pipeline stage has no loss.
    assert run_ranks(2, loss_of_two_ranks, [[0.0, 0.0], [6.0, 3.0]], str(tmp_path)) == [2.0, 2.0]


def test_losses_do_not_lose_digits(one_rank: None, tmp_path: Path) -> None:
    run_summary = RunSummary(arguments(num_experts=None), tmp_path)
    run_summary.evaluations.begin(1, is_test=False)
    for _ in range(1000):
        run_summary.evaluations.add(torch.tensor([2.0**24 + 2, 2.0**24]))
    run_summary.after_evaluation([])
    assert run_summary.evaluations.validations[0].loss == 1 + 2.0**-23


def test_several_validation_sets_have_a_loss_each_and_their_mean(
    one_rank: None, tmp_path: Path
) -> None:
    args = arguments(num_experts=None, full_validation=True, sffn_validation_batches=[3, 5])
    run_summary = RunSummary(args, tmp_path)
    evaluate(run_summary, 4, [5.0], [6.0])
    summary = run_summary.summary(shape(None))
    assert summary["validation_loss"] == 5.5
    assert summary["validation_losses"] == {"0": 5.0, "1": 6.0}
    args.validation_set_names = ["web", "code"]
    assert run_summary.summary(shape(None))["validation_losses"] == {"web": 5.0, "code": 6.0}


def test_a_resumed_run_keeps_the_curve_up_to_its_checkpoint(one_rank: None, tmp_path: Path) -> None:
    first_run = RunSummary(arguments(num_experts=None), tmp_path)
    for iteration in (2, 4, 6):
        evaluate(first_run, iteration, [float(iteration)])
    # Resumed from step 4: later evaluations of the first run are repeated, at another step.
    resumed = RunSummary(arguments(num_experts=None, iteration=4), tmp_path)
    evaluate(resumed, 7, [7.0])
    evaluate(resumed, 7, [9.0], is_test=True)
    assert curve(resumed) == [[2, 2.0], [4, 4.0], [7, 7.0]]
    # An evaluation alone replaces its own step.
    evaluation_only = RunSummary(
        arguments(num_experts=None, iteration=4, skip_train=True), tmp_path
    )
    evaluate(evaluation_only, 4, [4.5])
    assert curve(evaluation_only) == [[2, 2.0], [4, 4.5], [7, 7.0]]
    # Another run in the same folder has a curve of its own.
    new_run = RunSummary(arguments(num_experts=None), tmp_path)
    evaluate(new_run, 5, [1.0])
    assert curve(new_run) == [[5, 1.0]]


# summary.json


@pytest.mark.parametrize("do_test", [False, True])
def test_the_summary_has_losses_counts_and_the_layout(
    one_rank: None, clock: Clock, tmp_path: Path, do_test: bool
) -> None:
    run_summary = RunSummary(arguments(num_experts=None), tmp_path / "run")
    for seconds in (100.0, 2.0, 4.0, 3.0, 1.0):
        step(run_summary, clock, seconds)
    evaluate(run_summary, 4, [5.0])
    evaluate(run_summary, 5, [4.5])
    evaluate(run_summary, 5, [4.0])  # once more at the end
    if do_test:
        evaluate(run_summary, 5, [7.0], is_test=True)
    path = run_summary.write_summary(shape())
    assert path == tmp_path / "run" / "summary.json"
    summary = json.loads(path.read_text())
    assert summary.pop("peak_memory_bytes") > 1e8  # this process has imported torch
    assert summary.pop("versions").keys() == {"python", "megatron-sffn", "megatron-core", "torch"}
    described = describe_run(run_summary.args, shape())
    assert {name: summary.pop(name) for name in described} == described
    counts = count_parameters(shape())
    assert summary == {
        "router": "avg-k",
        "block_size": 2,
        "expansion": 2,
        "active_cells": 8,
        "num_blocks": 8,
        "num_active_blocks": 4,
        "iterations": 5,
        "tokens": 5 * 4 * 16,
        "validation_loss": 4.0,
        "validation_perplexity": pytest.approx(math.exp(4.0)),
        "test_loss": 7.0 if do_test else None,
        "validation_curve": [[4, 5.0], [5, 4.0]],
        "validation_losses": None,
        "parameters_total": counts.total,
        "parameters_active": counts.active,
        "flops_per_token": flops_per_token(shape()).total,
        "sent_bytes_per_token": None,
        # The median: the first steps are slow.
        "tokens_per_second": pytest.approx(16 * (4 / 3 + 4 / 4) / 2),
        "layout": {
            "world_size": 8,
            "tensor": 2,
            "pipeline": 1,
            "expert": 4,
            "expert_tensor": 1,
            "context": 1,
            "data": 4,
        },
        "seed": 11,
    }
    assert counts.active < counts.total


def test_the_summary_of_a_dense_run_without_steps_has_no_losses(tmp_path: Path) -> None:
    args = arguments(sffn_router="dense", num_experts=None)
    summary = RunSummary(args, tmp_path).summary(shape(None))
    assert summary["active_cells"] == 8
    for name in ("block_size", "expansion", "num_blocks", "num_active_blocks"):
        assert summary[name] is None
    for name in ("validation_loss", "validation_perplexity", "test_loss", "tokens_per_second"):
        assert summary[name] is None
    assert summary["validation_curve"] == []
    assert summary["parameters_active"] == summary["parameters_total"]


def test_a_loss_that_exploded_has_a_finite_perplexity(one_rank: None, tmp_path: Path) -> None:
    run_summary = RunSummary(arguments(num_experts=None), tmp_path)
    evaluate(run_summary, 1, [1e6])
    assert math.isfinite(run_summary.summary(shape())["validation_perplexity"])


def written_by(folder: str) -> tuple[bool, bool]:
    run_summary = RunSummary(arguments(num_experts=None), Path(folder))
    path = run_summary.write_summary(shape())
    torch.distributed.barrier()
    return path is not None, (Path(folder) / "summary.json").exists()


def test_rank_0_alone_writes_the_summary(tmp_path: Path) -> None:
    assert run_ranks(2, written_by, str(tmp_path)) == [(True, True), (False, True)]
