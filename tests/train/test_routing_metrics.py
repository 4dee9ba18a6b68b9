"""Routing statistics of a layer, the steps at which they are written, and the writers."""

from __future__ import annotations

import json
import math
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_sffn.nn.config import SparseFFNConfig
from megatron_sffn.nn.layer import SparseFFN
from megatron_sffn.nn.routers import ROUTERS
from megatron_sffn.nn.routers.base import Routing
from megatron_sffn.nn.routing_counters import SUMS
from megatron_sffn.nn.transformer_config import SparseFFNTransformerConfig
from megatron_sffn.train import routing_metrics
from megatron_sffn.train.routing_metrics import (
    LOSSES,
    NUMBERS,
    RoutingMetrics,
    describe,
    layer_numbers,
    layer_sums,
    scalars,
)
from megatron_sffn.train.summary import RunSummary
from tests.support.ranks import run_ranks

SFFN = SparseFFNConfig(router=ROUTERS["avg-k"](), active_cells=8, block_size=2, expansion=2)
BLOCKS = SFFN.num_blocks


def arguments(**changes: Any) -> Namespace:
    """Megatron's namespace before the first step."""
    values = {
        "curr_iteration": 0,
        "num_experts": BLOCKS,
        "num_layers": 3,
        "mtp_num_layers": None,
        "hybrid_layer_pattern": None,
        "data_parallel_size": 1,
        "log_interval": 2,
        "train_iters": 100,
        "exit_interval": None,
        "save": None,
        "save_interval": None,
        "skip_train": False,
    }
    return Namespace(**values | changes)


def layer(number: int) -> SparseFFN:
    """A sparse layer of a model of three."""
    config = SparseFFNTransformerConfig(
        num_layers=3,
        hidden_size=6,
        num_attention_heads=2,
        add_bias_linear=False,
        moe_router_load_balancing_type="none",
        expert_model_parallel_size=torch.distributed.get_world_size(),
        sffn=SFFN,
    )
    return SparseFFN(config, layer_number=number)


def use(sparse: SparseFFN, *blocks: int, gates: bool = False, scores: bool = False) -> None:
    """Count a token for each of these blocks, as training does."""
    sparse.trained(routing(blocks, gates=gates, scores=scores))


def evaluate(sparse: SparseFFN, *blocks: int) -> None:
    """Count a token for each of these blocks, as evaluation does."""
    sparse.evaluated(routing(blocks, gates=False, scores=False))


def routing(blocks: tuple[int, ...], *, gates: bool, scores: bool) -> Routing:
    ids = torch.tensor(blocks)[:, None]
    return Routing(
        block_ids=ids,
        gates=0.5 + ids / 10 if gates else None,
        scores=ids - 3.5 if scores else None,
    )


def sums(**changes: float) -> dict[str, float]:
    return dict.fromkeys(SUMS, 0.0) | changes


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "routing.jsonl").read_text().splitlines()]


# Numbers


def test_an_even_load_has_an_entropy_of_1_and_no_dead_blocks() -> None:
    numbers = describe(torch.full((8,), 5.0), sums(tokens=10, scores=40, negative_scores=10))
    assert numbers == {
        "tokens": 10,
        "load_entropy": pytest.approx(1),
        "dead_blocks": 0,
        "dead_share": 0,
        "load_p50": 1,
        "load_p95": 1,
        "load_max": 1,
        "gate_mean": None,
        "gate_std": None,
        "negative_share": 0.25,
        "empty_share": 0,
    }


def test_a_load_on_one_block_has_an_entropy_of_0() -> None:
    numbers = describe(torch.tensor([0.0, 12.0, 0.0, 0.0]), sums(tokens=16, empty_places=4))
    assert (numbers["load_entropy"], numbers["dead_blocks"], numbers["dead_share"]) == (0, 3, 0.75)
    assert (numbers["load_p50"], numbers["load_max"]) == (0, 4)
    assert numbers["load_p95"] == pytest.approx(0.85 * 4)
    assert numbers["empty_share"] == 0.25
    assert numbers["negative_share"] is None


@pytest.mark.parametrize("gates", [[0.2, 0.4, 0.9], [1e-9, 1e-9], [1.0]])
def test_mean_and_deviation_of_gates_follow_from_their_sums(gates: list[float]) -> None:
    values = torch.tensor(gates, dtype=torch.float64)
    load = torch.tensor([len(gates), 0])
    squares = float(values.square().sum())
    numbers = describe(load, sums(tokens=9, gates=float(values.sum()), squared_gates=squares))
    assert numbers["gate_mean"] == pytest.approx(float(values.mean()))
    assert numbers["gate_std"] == pytest.approx(float(values.std(correction=0)), abs=1e-9)


def test_numbers_are_finite_if_every_choice_was_dropped() -> None:
    numbers = describe(torch.zeros(4), sums(tokens=3, empty_places=3))
    assert (numbers["empty_share"], numbers["dead_share"], numbers["load_max"]) == (1, 1, 0)
    assert all(value is None or math.isfinite(value) for value in numbers.values())


def test_numbers_are_right_for_thousands_of_blocks() -> None:
    load = torch.zeros(65536)
    load[: 65536 // 2] = 2
    numbers = describe(load, sums(tokens=65536))
    assert numbers["load_entropy"] == pytest.approx(15 / 16)
    assert (numbers["load_p95"], numbers["dead_share"]) == (2, 0.5)


def table_of(load: list[int], losses: list[float], dense: int = 0) -> Tensor:
    """`layer_sums` of one sparse layer after dense ones."""
    row = torch.tensor([*load, 4, *[0] * (len(SUMS) - 1), *losses], dtype=torch.float64)
    return torch.stack([torch.zeros_like(row)] * dense + [row])


def test_layers_without_tokens_and_losses_without_a_weight_are_left_out() -> None:
    numbers = layer_numbers(table_of([1, 3], [1.25, 0, 0, 0, -0.1234567, 0], dense=2), 2)
    assert list(numbers) == [3]
    assert numbers[3]["layer"] == 3
    assert numbers[3]["load_balancing_loss"] == 1.25
    assert numbers[3]["entropy_loss"] == -0.123457
    assert not {"z_loss", "seq_load_balancing_loss", "l1_loss"} & numbers[3].keys()


def test_the_scalars_are_those_of_each_layer_and_their_mean() -> None:
    numbers = {
        2: {"layer": 2, "load_entropy": 0.5, "gate_mean": None, "z_loss": 1.0},
        6: {"layer": 6, "load_entropy": 1.0, "gate_mean": None, "z_loss": 3.0},
    }
    assert dict(scalars(numbers)) == {
        "routing/load_entropy": 0.75,
        "routing/load_entropy/layer_2": 0.5,
        "routing/load_entropy/layer_6": 1.0,
        "routing/z_loss": 2.0,
        "routing/z_loss/layer_2": 1.0,
        "routing/z_loss/layer_6": 3.0,
    }
    assert dict(scalars({})) == {}
    described = describe(torch.ones(2), sums(tokens=1)).keys()
    assert set(NUMBERS) < described


# Sums


def test_sums_include_the_layers_of_all_chunks(one_rank: None) -> None:
    first, third = layer(1), layer(3)
    use(first, 0, 0, 7, gates=True, scores=True)
    use(third, 5)
    evaluate(third, 2, 2)
    first.router.balance.values = {"z_loss": torch.tensor(4.0)}
    model = [torch.nn.ModuleList([first]), torch.nn.ModuleList([torch.nn.ReLU(), third])]
    table = layer_sums(model, arguments(), training=True)
    assert table[:, :BLOCKS].tolist() == [[2, 0, 0, 0, 0, 0, 0, 1], [0] * 8, [0] * 5 + [1, 0, 0]]
    named = dict(zip(SUMS, table[0, BLOCKS : BLOCKS + len(SUMS)].tolist(), strict=True))
    assert named == {
        "tokens": 3,
        "gates": pytest.approx(0.5 + 0.5 + 1.2),
        "squared_gates": pytest.approx(0.25 + 0.25 + 1.44),
        "negative_scores": 2,
        "scores": 3,
        "empty_places": 0,
    }
    assert table[0, -len(LOSSES) :].tolist() == [0, 0, 0, 4, 0, 0]
    assert layer_sums(model, arguments(), training=True).sum() == 0
    assert layer_sums(model, arguments(), training=False)[2, 2] == 2


def sums_of_a_rank() -> list[list[float]]:
    rank, sparse = torch.distributed.get_rank(), layer(2)
    use(sparse, *([1] if rank == 0 else [1, 6, 6]))
    return layer_sums([sparse], arguments(), training=True)[:, :BLOCKS].tolist()


def test_sums_are_those_of_all_ranks() -> None:
    expected = [[0] * 8, [0, 2, 0, 0, 0, 0, 2, 0], [0] * 8]
    assert run_ranks(2, sums_of_a_rank, expert_model_parallel_size=2) == [expected, expected]


# Lines


def steps(log: RoutingMetrics, sparse: SparseFFN, first: int, last: int, block: int = 0) -> None:
    """Training steps of two microbatches of one token each."""
    for iteration in range(first, last + 1):
        log.args.curr_iteration = iteration - 1
        use(sparse, block)
        use(sparse, block + 1)
        log.after_step([sparse], 2)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, [(2, 2), (4, 2), (6, 2)]),
        ({"log_interval": 100}, []),
        ({"log_interval": 100, "train_iters": 7}, [(7, 7)]),
        ({"log_interval": 4, "exit_interval": 3}, [(3, 3), (4, 1), (6, 2)]),
        ({"log_interval": 4, "save_interval": 3}, [(4, 4)]),
        ({"log_interval": 4, "save_interval": 3, "save": "here"}, [(3, 3), (4, 1), (6, 2)]),
    ],
)
def test_a_line_holds_all_steps_since_the_last_line(
    one_rank: None, tmp_path: Path, flags: dict[str, Any], expected: list[tuple[int, int]]
) -> None:
    log = RoutingMetrics(arguments(**flags), tmp_path)
    steps(log, layer(1), 1, 7)
    lines = rows(tmp_path) if expected else []
    assert [(row["iteration"], row["steps"]) for row in lines] == expected
    assert all(row["tokens"] == 2 * row["steps"] for row in lines)
    assert expected or not list(tmp_path.iterdir())


def test_losses_are_means_over_microbatches_and_data_parallel_ranks(
    one_rank: None, tmp_path: Path
) -> None:
    log, sparse = (
        RoutingMetrics(arguments(log_interval=1, data_parallel_size=2), tmp_path),
        layer(1),
    )
    # The sum of two ranks with four microbatches each.
    sparse.router.balance.values = {"load_balancing_loss": torch.tensor([4.0, 8.0])}
    use(sparse, 0)
    log.after_step([sparse], 4)
    assert rows(tmp_path)[0]["load_balancing_loss"] == 12 / 8


def test_an_evaluation_between_two_lines_is_a_line_of_its_own(
    one_rank: None, tmp_path: Path
) -> None:
    log, sparse = RoutingMetrics(arguments(), tmp_path), layer(3)
    steps(log, sparse, 1, 3)
    evaluate(sparse, 2, 2, 2, 4, 4, 4)
    log.after_evaluation([sparse], 3, repeated=False)
    evaluate(sparse, 5)
    log.after_evaluation([sparse], 3, repeated=True)
    steps(log, sparse, 4, 4)
    first, evaluation, second = rows(tmp_path)
    assert [row["iteration"] for row in (first, evaluation, second)] == [2, 3, 4]
    assert (first["tokens"], second["tokens"]) == (4, 4)
    assert evaluation == {
        "iteration": 3,
        "phase": "evaluation",
        "layer": 3,
        "tokens": 6,
        "load_entropy": 0.333333,
        "dead_blocks": 6,
        "dead_share": 0.75,
        "load_p50": 0.0,
        "load_p95": 4.0,
        "load_max": 4.0,
        "gate_mean": None,
        "gate_std": None,
        "negative_share": None,
        "empty_share": 0.0,
        "tokens_per_block": [0, 0, 3, 0, 3, 0, 0, 0],
    }


def most_used_blocks(folder: Path) -> list[tuple[int, str, int]]:
    """Iteration, phase and number of the most used block of each line."""
    return [
        (row["iteration"], row["phase"][:1], row["tokens_per_block"].index(1))
        for row in rows(folder)
        if "tokens_per_block" in row
    ]


def run(folder: Path, sparse: SparseFFN, first: int, last: int, block: int, **flags: Any) -> None:
    """A process: steps, with an evaluation after each second one."""
    log = RoutingMetrics(arguments(**flags), folder)
    for iteration in range(first, last + 1):
        steps(log, sparse, iteration, iteration)
        if iteration % 2 == 0:
            evaluate(sparse, block)
            log.after_evaluation([sparse], iteration, repeated=False)


def test_a_resumed_run_replaces_the_lines_after_its_checkpoint(
    one_rank: None, tmp_path: Path
) -> None:
    sparse = layer(1)
    run(tmp_path, sparse, 1, 7, block=0)
    # From the checkpoint of step 4, evaluated and logged before it was saved.
    run(tmp_path, sparse, 5, 8, block=3)
    assert most_used_blocks(tmp_path) == [(2, "e", 0), (4, "e", 0), (6, "e", 3), (8, "e", 3)]
    phases = [(row["iteration"], row["phase"]) for row in rows(tmp_path)]
    assert phases == [
        (iteration, phase) for iteration in (2, 4, 6, 8) for phase in ("training", "evaluation")
    ]
    # From scratch.
    run(tmp_path, sparse, 1, 2, block=5)
    assert most_used_blocks(tmp_path) == [(2, "e", 5)]


def test_a_run_without_steps_replaces_its_evaluation_alone(one_rank: None, tmp_path: Path) -> None:
    sparse = layer(1)
    run(tmp_path, sparse, 1, 6, block=0)
    for skip_train, iteration, block in ((True, 2, 4), (False, 6, 7)):
        log = RoutingMetrics(arguments(skip_train=skip_train), tmp_path)
        evaluate(sparse, block)
        log.after_evaluation([sparse], iteration, repeated=False)
    assert most_used_blocks(tmp_path) == [(2, "e", 4), (4, "e", 0), (6, "e", 7)]
    assert len(rows(tmp_path)) == 6


def test_lines_of_former_versions_are_evaluations(one_rank: None, tmp_path: Path) -> None:
    (tmp_path / "routing.jsonl").write_text('{"iteration": 2, "layer": 1}\n')
    log, sparse = RoutingMetrics(arguments(), tmp_path), layer(1)
    evaluate(sparse, 1)
    log.after_evaluation([sparse], 2, repeated=False)
    assert most_used_blocks(tmp_path) == [(2, "e", 1)]


def test_a_dense_run_has_no_lines(one_rank: None, tmp_path: Path) -> None:
    run_summary = RunSummary(arguments(num_experts=None), tmp_path)
    run_summary.after_step([torch.nn.ReLU()], 4)
    assert list(tmp_path.iterdir()) == []


# TensorBoard and W&B


class Writer:
    """Stands in for the writers of TensorBoard and of W&B."""

    def __init__(self) -> None:
        self.scalars_by_step: dict[int, dict[str, float]] = {}

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars_by_step.setdefault(step, {})[name] = value

    def log(self, values: dict[str, float], step: int) -> None:
        self.scalars_by_step[step] = values


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_tensorboard_and_wandb_get_the_scalars_of_each_line(
    one_rank: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    writer = Writer()
    monkeypatch.setattr(routing_metrics, f"get_{kind}_writer", lambda: writer)
    log, sparse = RoutingMetrics(arguments(), tmp_path), layer(2)
    steps(log, sparse, 1, 4, block=2)
    assert list(writer.scalars_by_step) == [2, 4]
    assert writer.scalars_by_step[2]["routing/dead_share/layer_2"] == 6 / 8
    assert writer.scalars_by_step[2]["routing/dead_share"] == 6 / 8
    assert not any("gate" in name for name in writer.scalars_by_step[2])
