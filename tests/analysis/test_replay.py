"""The run's command on one rank, and checkpoints that cannot be replayed."""

from __future__ import annotations

import os
import sys
import time
import warnings
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy
import pytest

from megatron_sffn.analysis import replay
from megatron_sffn.train.routing_trace import RoutingTrace
from megatron_sffn.utils.errors import ConfigError


def recording(seed: int = 0, *, layer: int = 2, tokens: int = 24) -> RoutingTrace:
    random = numpy.random.default_rng(seed)
    return RoutingTrace(
        token_ids=numpy.arange(tokens, dtype=numpy.int32),
        blocks={layer: random.integers(-1, 9, (tokens, 3)).astype(numpy.int16)},
        num_blocks=9,
    )


@pytest.mark.parametrize(
    ("command", "left"),
    [
        ("--lr 1 --save x --seed 3", "--lr 1 --seed 3"),
        ("--save=x --seed 3", "--seed 3"),
        ("--save-interval 100 --save-retain-interval 1000 --seed 3", "--seed 3"),
        ("--sequence-parallel --lr -1", "--lr -1"),
        ("--data-path 1 a 2 b --tensor-model-parallel-size 8", "--data-path 1 a 2 b"),
        ("--pipeline-model-parallel-layout Et*4|t*4L --swiglu", "--swiglu"),
        ("--wandb-project p --wandb-exp-name n", ""),
        ("--save-something 1", "--save-something 1"),
    ],
)
def test_flags_of_layouts_and_results_are_taken_out(command: str, left: str) -> None:
    assert replay.without(command.split(), replay.REMOVED) == left.split()


def test_every_flag_that_is_taken_out_is_one_of_megatrons(monkeypatch) -> None:
    from megatron.training.arguments import parse_args

    from megatron_sffn.flags.sffn_flags import add_sffn_flags

    known: set[str] = set()

    def collect(parser):
        add_sffn_flags(parser)
        known.update(option for action in parser._actions for option in action.option_strings)
        return parser

    monkeypatch.setattr(sys, "argv", ["pretrain"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # argparse's, of Megatron's own flags
        parse_args(collect)
    assert known >= replay.REMOVED


def test_a_process_alone_is_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    found = replay.without_rank(os.environ)
    assert "RANK" not in found
    assert found["OMP_NUM_THREADS"] == "5"


def test_recordings_are_read_as_they_were_written(tmp_path: Path) -> None:
    path, made = tmp_path / "deep" / "one.npz", recording()
    made.save(path)
    found = RoutingTrace.load(path)
    assert (found.token_ids == made.token_ids).all()
    assert (found.blocks[2] == made.blocks[2]).all()
    assert (found.num_blocks, list(found.blocks)) == (9, [2])
    assert list(path.parent.iterdir()) == [path]


@pytest.fixture
def player(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A replay of iteration 5, without a run: `player.runs` counts."""
    run = tmp_path / "run"
    (run / "iter_0000005").mkdir(parents=True)
    (run / "iter_0000005" / "metadata.json").write_text("{}")
    said: list[str] = []
    made = replay.Replay(run=run, folder=tmp_path / "out", tokens=20, say=said.append)
    runs: list[int] = []

    def record(self: replay.Replay, iteration: int, args: Namespace, path: Path) -> None:
        runs.append(iteration)
        recording().save(path)

    monkeypatch.setattr(replay.Replay, "_run", record)
    return Namespace(replay=made, runs=runs, said=said, run=run)


def test_a_recording_that_is_there_is_used_again(player: Any) -> None:
    for _ in range(2):
        found = player.replay.recording(5, Namespace())
        assert len(found.token_ids) == len(found.blocks[2]) == 20
    assert player.runs == [5]
    assert player.said[0] == "iteration 5: replaying 20 tokens"
    # The run was trained anew.
    later = time.time() + 10
    os.utime(player.run / "iter_0000005" / "metadata.json", (later, later))
    player.replay.recording(5, Namespace())
    assert player.runs == [5, 5]


def test_recordings_of_other_tokens_are_not_compared() -> None:
    one, other = recording(), recording(tokens=23)
    replay.check_same_tokens({1: one, 2: recording(1)})
    with pytest.raises(ConfigError, match="iterations 1 and 3 differ"):
        replay.check_same_tokens({1: one, 3: other})


def checkpoint(
    monkeypatch: pytest.MonkeyPatch, run: Path, problem: str | None = None, **args: Any
) -> None:
    """A folder with checkpoint 4, of which only the arguments are looked at."""
    (run / "iter_0000004").mkdir(parents=True)
    monkeypatch.setattr(replay, "problem_of", lambda folder: problem)
    monkeypatch.setattr(replay, "read_common", lambda folder: {"args": Namespace(**args)})


SPARSE = {"sffn_router": "avg-k", "sffn_command": []}


def test_checkpoints_of_a_sparse_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint(monkeypatch, tmp_path, **SPARSE)
    assert list(replay.checkpoints(tmp_path, None, print)) == [4]
    assert list(replay.checkpoints(tmp_path, [4], print)) == [4]


@pytest.mark.parametrize(
    ("args", "wanted", "said"),
    [
        ({"sffn_router": "dense", "sffn_command": []}, None, "is dense"),
        ({}, None, "is dense"),
        ({"sffn_router": "avg-k"}, None, "does not hold the command line"),
        (SPARSE, [3], r"--iterations 3 is no checkpoint in .* \(there are: 4\)"),
        ({"problem": "x is truncated"}, [4], "cannot be replayed: x is truncated"),
        ({"problem": "x is truncated"}, None, "holds no checkpoint to replay"),
    ],
)
def test_checkpoints_that_cannot_be_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: Any, wanted: Any, said: str
) -> None:
    checkpoint(monkeypatch, tmp_path, **args)
    with pytest.raises(ConfigError, match=said):
        replay.checkpoints(tmp_path, wanted, print)


def test_a_run_without_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no checkpoint to replay"):
        replay.checkpoints(tmp_path, None, print)
