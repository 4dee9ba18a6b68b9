"""The tool analyses real runs, which are trained on several ranks and replayed on one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import analyze_routing
import numpy
import pytest

from megatron_sffn.train.routing_trace import RoutingTrace
from megatron_sffn.utils.errors import ConfigError

FLAGS = """
    --num-layers 4 --train-iters 4 --save-interval 2 --split 80,10,10 --eval-interval 2
    --sffn-router switch --sffn-layers 1,3
"""
LAYOUT = """
    --tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2
    --num-layers-per-virtual-pipeline-stage 1 --expert-model-parallel-size 2
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
"""


@pytest.fixture(scope="module")
def folder_of_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture
def run(pretrain, folder_of_run: Path) -> Path:
    """A run on four ranks with checkpoints at iterations 2 and 4, trained on first use."""
    if not (folder_of_run / "summary.json").exists():
        events = folder_of_run / "events"
        pretrain(4, f"{FLAGS} {LAYOUT} --save {folder_of_run} --tensorboard-dir {events}")
    return folder_of_run


def read_files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_on_four_ranks_can_be_analyzed(run: Path, tmp_path: Path, capsys: Any) -> None:
    files_before, output = read_files(run), tmp_path / "out"
    arguments = [str(run), "--out", str(output), "--tokens", "300", "--top", "5"]
    assert analyze_routing.main(arguments) == 0
    stdout = capsys.readouterr().out
    assert "iteration 2: replaying 300 tokens" in stdout
    assert stdout.endswith(f"page: {output}/index.html\n")
    # The files of the run do not change.
    assert read_files(run) == files_before
    first_trace, second_trace = (
        RoutingTrace.load(path) for path in sorted((output / "recordings").iterdir())
    )
    assert (first_trace.token_ids == second_trace.token_ids).all()
    assert list(first_trace.blocks) == [2, 4]
    # Complete microbatches of 2 x 64 tokens.
    assert first_trace.blocks[2].shape == (384, 16)
    assert first_trace.blocks[2].min() >= 0
    assert first_trace.blocks[2].max() < first_trace.num_blocks == 64
    assert (numpy.diff(first_trace.blocks[2], axis=1) > 0).all()
    assert (first_trace.blocks[2] != second_trace.blocks[2]).any()
    summary = json.loads((output / "summary.json").read_text())
    assert summary["recorded_tokens"] == 300
    layer_summary = summary["layers"]["4"]
    assert layer_summary["kept_by_chance"] < layer_summary["kept"]["4"] < 1

    # A second analysis, of one layer and one checkpoint, replays nothing.
    assert analyze_routing.main([*arguments, "--layers", "4", "--iterations", "4"]) == 0
    assert "replaying" not in capsys.readouterr().out
    summary = json.loads((output / "summary.json").read_text())
    assert (list(summary["layers"]), summary["iterations"]) == (["4"], [4])


def test_recorded_blocks_are_those_of_the_router(
    run: Path, pretrain, tmp_path: Path, text: str
) -> None:
    # The replay also logs its evaluation, with the loads of the recording.
    flags = f"{FLAGS} --load {run} --ckpt-step 4 --save {tmp_path} --skip-train"
    record = f"--no-load-optim --no-load-rng --sffn-record-routing {tmp_path / 'blocks.npz'}"
    pretrain(1, f"{flags} {record}")
    trace = RoutingTrace.load(tmp_path / "blocks.npz")
    lines = [json.loads(line) for line in (tmp_path / "routing.jsonl").read_text().splitlines()]
    assert [line["layer"] for line in lines] == list(trace.blocks) == [2, 4]
    for line in lines:
        counts = numpy.bincount(trace.blocks[line["layer"]].ravel(), minlength=64)
        assert counts.tolist() == line["tokens_per_block"]
    # The validation data contains the tokens of the first sample; the recording is [S, batch].
    data = numpy.fromfile(f"{text}.bin", dtype=numpy.uint16).tobytes()
    sample = trace.token_ids[:128].reshape(64, 2)[:, 0].astype(numpy.uint16).tobytes()
    assert sample in data


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--skip-train --sffn-router dense", "dense chooses no blocks"),
        ("", "add --skip-train and --load"),
    ],
)
def test_recording_without_evaluation_or_a_sparse_model_is_refused(
    pretrain, flags: str, message: str
) -> None:
    with pytest.raises(AssertionError, match=message):
        pretrain(1, f"--train-iters 1 --split 90,10,0 --sffn-record-routing x.npz {flags}")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--tokens 0", "--tokens 0 must be at least 1"),
        ("--top -1", "--top -1 must be at least 1"),
        ("--layers 3", "--layers 3 is no sparse layer of .*; use some of 2, 4"),
        ("--iterations 3", "--iterations 3 is no checkpoint in .*there are: 2, 4"),
        ("-- --data-path /gone/text", "replaying iteration 2 failed .*/gone/text.* after --"),
        ("-- --eval-iters 0", "has no validation data"),
    ],
)
def test_runs_that_cannot_be_analyzed_are_refused(
    run: Path, tmp_path: Path, flags: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        analyze_routing.main([str(run), "--out", str(tmp_path), *flags.split()])


def test_a_dense_run_is_refused(pretrain, tmp_path: Path) -> None:
    flags = "--train-iters 1 --save-interval 1 --split 90,10,0 --sffn-router dense"
    pretrain(1, f"{flags} --save {tmp_path / 'dense'}")
    with pytest.raises(ConfigError, match="the run is dense"):
        analyze_routing.main([str(tmp_path / "dense")])
