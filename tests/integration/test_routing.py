"""Lines about routing: the same on every layout, and the same after a run was killed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

EP2 = "--expert-model-parallel-size 2"
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
PP2 = "--pipeline-model-parallel-size 2"
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
RUN = "--num-layers 4 --train-iters 3 --split 90,10,0 --log-interval 2 --save-interval 1000"
# The second pipeline stage has both sparse layers, the first none. (The loss over the whole step
# and the entropy loss use the microbatches of all ranks at once, so they depend on the layout.)
FLAGS = f"""
    {RUN} --sffn-router switch --sffn-layers 2,3 --moe-z-loss-coeff 0.001
    --moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 0.01
"""


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "routing.jsonl").read_text().splitlines()]


@pytest.fixture
def one_rank_lines(pretrain, tmp_path_factory, cached_lines) -> list[dict[str, Any]]:
    if not cached_lines:
        folder = tmp_path_factory.mktemp("one")
        pretrain(1, f"{FLAGS} --save {folder}")
        cached_lines.extend(lines(folder))
    return cached_lines


@pytest.fixture(scope="module")
def cached_lines() -> list[dict[str, Any]]:
    return []


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (2, EP2),  # with two data-parallel ranks
        (4, f"{TP2} {PP2} {EP2}"),
        (2, f"{TP2} --expert-tensor-parallel-size 2 {FULL}"),
        (2, f"{PP2} --num-layers-per-virtual-pipeline-stage 1"),
    ],
    ids=["DP2 EP2", "TP2 PP2 EP2", "TP2 ETP2 full", "PP2 VPP2"],
)
def test_lines_are_the_same_on_every_layout(
    pretrain, tmp_path: Path, one_rank_lines, ranks: int, layout: str
) -> None:
    pretrain(ranks, f"{FLAGS} {layout} --save {tmp_path}")
    layout_lines = lines(tmp_path)
    assert len(layout_lines) == len(one_rank_lines) == 6
    for line, expected in zip(layout_lines, one_rank_lines, strict=True):
        assert line.keys() == expected.keys()
        assert line["phase"] == expected["phase"]
        # A near tie may go the other way.
        loads = line.get("tokens_per_block", [])
        assert loads == pytest.approx(expected.get("tokens_per_block", []), abs=2)
        numbers = {name: value for name, value in line.items() if name not in NO_NUMBERS}
        assert numbers == pytest.approx(
            {name: expected[name] for name in numbers}, rel=0.01, abs=0.01
        )


NO_NUMBERS = ("phase", "tokens_per_block")


def test_lines_have_the_statistics_of_each_layer_and_phase(one_rank_lines) -> None:
    heads = [(line["iteration"], line["phase"], line["layer"]) for line in one_rank_lines]
    # Two steps at the interval, the last one at the end, and the evaluation after it.
    assert heads == [
        (iteration, phase, layer)
        for iteration, phase in ((2, "training"), (3, "training"), (3, "evaluation"))
        for layer in (3, 4)
    ]
    for line in one_rank_lines:
        trains = line["phase"] == "training"
        steps = line["steps"] if trains else 2  # --eval-iters
        assert line["tokens"] == steps * 8 * 64
        assert 0.5 < line["load_entropy"] <= 1
        assert line["load_p50"] <= line["load_p95"] <= line["load_max"] <= 64
        assert line["dead_share"] == line["dead_blocks"] / 64
        # 16 of 64 softmax gates, the largest.
        assert 1 / 64 < line["gate_mean"] < 1 / 16
        assert line["empty_share"] == 0
        if trains:
            assert line["seq_load_balancing_loss"] == pytest.approx(1, abs=0.2)
            assert line["z_loss"] > 0
        else:
            assert sum(line["tokens_per_block"]) == line["tokens"] * 16
            assert "z_loss" not in line


def test_tensorboard_has_the_statistics_and_the_progress_line_has_not(
    pretrain, tmp_path: Path
) -> None:
    flags = f"{FLAGS} --save {tmp_path} --tensorboard-dir {tmp_path / 'events'}"
    # Megatron's writer is on the last rank, the file on the first.
    log = pretrain(2, f"{flags} {PP2}")
    assert "entropy" not in log.text
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    training = [line for line in lines(tmp_path) if line["phase"] == "training"]
    for name in ("load_entropy", "gate_std", "negative_share", "z_loss"):
        layers = []
        for layer in (3, 4):
            layer_events = events.Scalars(f"routing/{name}/layer_{layer}")
            layer_lines = [line for line in training if line["layer"] == layer]
            assert (
                [event.step for event in layer_events]
                == [line["iteration"] for line in layer_lines]
                == [2, 3]
            )
            layers.append([line[name] for line in layer_lines])
            assert [event.value for event in layer_events] == pytest.approx(layers[-1])
        means = [sum(values) / 2 for values in zip(*layers, strict=True)]
        assert [event.value for event in events.Scalars(f"routing/{name}")] == pytest.approx(means)
    assert "routing/load_balancing_loss" not in events.Tags()["scalars"]


@pytest.mark.parametrize(
    ("router", "known"),
    [
        ("rand-hash", {"gate_mean": False, "negative_share": False}),
        ("avg-k", {"gate_mean": False, "negative_share": True}),
        ("pkm --sffn-block-size 1 --sffn-expansion 8", {"gate_mean": True, "negative_share": True}),
    ],
)
def test_statistics_that_a_router_does_not_have_are_null(
    pretrain, tmp_path: Path, router: str, known: dict[str, bool]
) -> None:
    flags = "--train-iters 1 --split 90,10,0 --log-interval 9 --eval-iters 1 --save-interval 9"
    events = tmp_path / "events"
    pretrain(1, f"{flags} --sffn-router {router} --tensorboard-dir {events} --save {tmp_path}")
    records = lines(tmp_path)
    # An interval longer than the run ends with it.
    assert [line["phase"] for line in records] == ["training"] * 2 + ["evaluation"] * 2
    for name, is_known in known.items():
        assert all((line[name] is not None) == is_known for line in records), name
    tags = EventAccumulator(str(events)).Reload().Tags()["scalars"]
    assert ("routing/gate_mean" in tags) == known["gate_mean"]


def test_a_resumed_run_writes_the_lines_of_an_undisturbed_one(pretrain, tmp_path: Path) -> None:
    # Saves at 2, 4, 6 are no multiples of the log interval; evaluations at 4 lie between lines.
    flags = (
        "--train-iters 6 --split 90,10,0 --log-interval 3 --save-interval 2 --eval-interval 4 "
        "--eval-iters 1 --sffn-router sigma-moe --sffn-block-dropout 0.1 --sffn-entropy-coeff 1e-3"
    )
    pretrain(1, f"{flags} --save {tmp_path / 'whole'}")
    resumable = f"{flags} --save {tmp_path / 'parts'} --load {tmp_path / 'parts'}"
    pretrain(1, f"{resumable} --exit-interval 4")
    expected = (tmp_path / "whole" / "routing.jsonl").read_text()
    path = tmp_path / "parts" / "routing.jsonl"
    # Killed in the middle of step 6's lines.
    expected_lines = expected.splitlines(keepends=True)
    path.write_text("".join(line for line in expected_lines if json.loads(line)["iteration"] < 6))
    with path.open("a") as file:
        file.write(expected_lines[-1][:50])
    pretrain(1, resumable)
    assert path.read_text() == expected
    records = lines(tmp_path / "whole")
    steps = {(record["iteration"], record["phase"]): record.get("steps") for record in records}
    assert steps == {
        (2, "training"): 2,
        (3, "training"): 1,
        (4, "training"): 1,
        (4, "evaluation"): None,
        (6, "training"): 2,
        (6, "evaluation"): None,
    }
    for line in records:
        if line["phase"] == "training":
            assert -math.log(64) <= line["entropy_loss"] < -3


def steps_of(folder: Path, phase: str) -> list[int]:
    """Iterations of the first layer's lines."""
    phase_lines = [line for line in lines(folder) if line["phase"] == phase]
    return [line["iteration"] for line in phase_lines if line["layer"] == phase_lines[0]["layer"]]


def test_a_run_resumed_with_a_larger_batch_keeps_its_lines(pretrain, tmp_path: Path) -> None:
    flags = f"--sffn-router switch --split 60,40,0 --eval-interval 2 --save {tmp_path}"
    pretrain(1, f"{flags} --train-iters 8 --save-interval 8")
    resumed = f"{flags} --load {tmp_path} --global-batch-size 32 --override-opt-param-scheduler"
    pretrain(1, f"{resumed} --train-iters 12 --save-interval 100")
    assert steps_of(tmp_path, "training") == list(range(1, 13))
    assert steps_of(tmp_path, "evaluation") == [2, 4, 6, 8, 10, 12]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["iterations"] == 12
    assert [step for step, _ in summary["validation_curve"]] == [2, 4, 6, 8, 10, 12]


def test_steps_of_a_growing_batch_are_counted_as_megatron_counts_them(
    pretrain, tmp_path: Path, monkeypatch
) -> None:
    # The first 16 samples (1,024 tokens) in steps of 4, the other 48 in steps of 8.
    model = pretrain.__globals__["MODEL"].replace("--global-batch-size 8", "")
    monkeypatch.setitem(pretrain.__globals__, "MODEL", model)
    schedule = "--train-samples 64 --step-batch-size-schedule '0:4 1K:8' --eval-interval 2"
    pretrain(
        1, f"--sffn-router switch --split 60,40,0 {schedule} --save {tmp_path} --save-interval 100"
    )
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["iterations"] == 10
    assert [step for step, _ in summary["validation_curve"]] == [2, 4, 6, 8, 10]
    assert steps_of(tmp_path, "evaluation") == [2, 4, 6, 8, 10]
