"""A replay runs the command of a run on one rank, and refuses unusable checkpoints."""

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


def random_trace(seed: int = 0, *, layer: int = 2, tokens: int = 24) -> RoutingTrace:
    random = numpy.random.default_rng(seed)
    return RoutingTrace(
        token_ids=numpy.arange(tokens, dtype=numpy.int32),
        blocks={layer: random.integers(-1, 9, (tokens, 3)).astype(numpy.int16)},
        num_blocks=9,
    )


@pytest.mark.parametrize(
    ("command", "remaining"),
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
def test_flags_of_layouts_and_outputs_are_removed(command: str, remaining: str) -> None:
    assert replay.without(command.split(), replay.REMOVED) == remaining.split()


def test_every_removed_flag_exists(monkeypatch) -> None:
    from megatron.training.arguments import parse_args

    from megatron_sffn.flags.sffn_flags import add_sffn_flags

    known: set[str] = set()

    def collect(parser):
        add_sffn_flags(parser)
        known.update(option for action in parser._actions for option in action.option_strings)
        return parser

    monkeypatch.setattr(sys, "argv", ["pretrain"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # argparse warns about Megatron's flags
        parse_args(collect)
    assert known >= replay.REMOVED


def test_the_environment_of_a_replay_has_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    variables = replay.without_rank(os.environ)
    assert "RANK" not in variables
    assert variables["OMP_NUM_THREADS"] == "5"


def test_a_saved_recording_can_be_loaded(tmp_path: Path) -> None:
    path, trace = tmp_path / "deep" / "one.npz", random_trace()
    trace.save(path)
    loaded = RoutingTrace.load(path)
    assert (loaded.token_ids == trace.token_ids).all()
    assert (loaded.blocks[2] == trace.blocks[2]).all()
    assert (loaded.num_blocks, list(loaded.blocks)) == (9, [2])
    assert list(path.parent.iterdir()) == [path]


@pytest.fixture
def player(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A replay of iteration 5 that saves a random recording; `player.runs` lists its iterations."""
    run = tmp_path / "run"
    (run / "iter_0000005").mkdir(parents=True)
    (run / "iter_0000005" / "metadata.json").write_text("{}")
    log: list[str] = []
    player = replay.Replay(run=run, folder=tmp_path / "out", tokens=20, say=log.append)
    runs: list[int] = []

    def save_random_trace(self: replay.Replay, iteration: int, args: Namespace, path: Path) -> None:
        runs.append(iteration)
        random_trace().save(path)

    monkeypatch.setattr(replay.Replay, "_run", save_random_trace)
    return Namespace(replay=player, runs=runs, log=log, run=run)


def test_an_existing_recording_is_reused(player: Any) -> None:
    for _ in range(2):
        trace = player.replay.recording(5, Namespace())
        assert len(trace.token_ids) == len(trace.blocks[2]) == 20
    assert player.runs == [5]
    assert player.log[0] == "iteration 5: replaying 20 tokens"
    # After the run is trained again, the recording is replaced.
    later = time.time() + 10
    os.utime(player.run / "iter_0000005" / "metadata.json", (later, later))
    player.replay.recording(5, Namespace())
    assert player.runs == [5, 5]


def test_recordings_of_different_tokens_are_refused() -> None:
    trace, shorter_trace = random_trace(), random_trace(tokens=23)
    replay.check_same_tokens({1: trace, 2: random_trace(1)})
    with pytest.raises(ConfigError, match="iterations 1 and 3 differ"):
        replay.check_same_tokens({1: trace, 3: shorter_trace})


def make_checkpoint(
    monkeypatch: pytest.MonkeyPatch, run: Path, problem: str | None = None, **args: Any
) -> None:
    """Make a folder with checkpoint 4, of which only the arguments are read."""
    (run / "iter_0000004").mkdir(parents=True)
    monkeypatch.setattr(replay, "problem_of", lambda folder: problem)
    monkeypatch.setattr(replay, "read_common", lambda folder: {"args": Namespace(**args)})


SPARSE = {"sffn_router": "avg-k", "sffn_command": []}


def test_checkpoints_of_a_sparse_run_are_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint(monkeypatch, tmp_path, **SPARSE)
    assert list(replay.checkpoints(tmp_path, None, print)) == [4]
    assert list(replay.checkpoints(tmp_path, [4], print)) == [4]


@pytest.mark.parametrize(
    ("args", "iterations", "message"),
    [
        ({"sffn_router": "dense", "sffn_command": []}, None, "is dense"),
        ({}, None, "is dense"),
        ({"sffn_router": "avg-k"}, None, "does not hold the command line"),
        (SPARSE, [3], r"--iterations 3 is no checkpoint in .* \(there are: 4\)"),
        ({"problem": "x is truncated"}, [4], "cannot be replayed: x is truncated"),
        ({"problem": "x is truncated"}, None, "holds no checkpoint to replay"),
    ],
)
def test_checkpoints_that_cannot_be_replayed_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: Any, iterations: Any, message: str
) -> None:
    make_checkpoint(monkeypatch, tmp_path, **args)
    with pytest.raises(ConfigError, match=message):
        replay.checkpoints(tmp_path, iterations, print)


def test_a_run_without_checkpoints_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no checkpoint to replay"):
        replay.checkpoints(tmp_path, None, print)
