"""The tool on real runs: trained on many ranks, replayed on one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import analyze_routing
import numpy
import pytest

from megatron_sffn.train.routing_trace import RoutingTrace
from megatron_sffn.utils.errors import ConfigError
from tests.support.processes import HANGS

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
    """A run on four ranks with checkpoints of 2 and 4, trained when it is first asked for."""
    if not (folder_of_run / "summary.json").exists():
        events = folder_of_run / "events"
        pretrain(4, f"{FLAGS} {LAYOUT} --save {folder_of_run} --tensorboard-dir {events}")
    return folder_of_run


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_on_four_ranks_is_analyzed(run: Path, tmp_path: Path, capsys: Any) -> None:
    before, out = contents(run), tmp_path / "out"
    arguments = [str(run), "--out", str(out), "--tokens", "300", "--top", "5"]
    assert analyze_routing.main(arguments) == 0
    said = capsys.readouterr().out
    assert "iteration 2: replaying 300 tokens" in said
    assert said.endswith(f"page: {out}/index.html\n")
    # Nothing of the run itself changes.
    assert contents(run) == before
    one, other = (RoutingTrace.load(path) for path in sorted((out / "recordings").iterdir()))
    assert (one.token_ids == other.token_ids).all()
    assert list(one.blocks) == [2, 4]
    # Whole microbatches of 2 x 64.
    assert one.blocks[2].shape == (384, 16)
    assert one.blocks[2].min() >= 0
    assert one.blocks[2].max() < one.num_blocks == 64
    assert (numpy.diff(one.blocks[2], axis=1) > 0).all()
    assert (one.blocks[2] != other.blocks[2]).any()
    summary = json.loads((out / "summary.json").read_text())
    assert summary["recorded_tokens"] == 300
    found = summary["layers"]["4"]
    assert found["kept_by_chance"] < found["kept"]["4"] < 1

    # Once more, without replaying anything, for one layer and one checkpoint.
    assert analyze_routing.main([*arguments, "--layers", "4", "--iterations", "4"]) == 0
    assert "replaying" not in capsys.readouterr().out
    summary = json.loads((out / "summary.json").read_text())
    assert (list(summary["layers"]), summary["iterations"]) == (["4"], [4])


def test_recorded_blocks_are_those_of_the_router(
    run: Path, pretrain, tmp_path: Path, text: str
) -> None:
    # The evaluation of the replay counts, too: its loads are those of the recording.
    flags = f"{FLAGS} --load {run} --ckpt-step 4 --save {tmp_path} --skip-train"
    record = f"--no-load-optim --no-load-rng --sffn-record-routing {tmp_path / 'blocks.npz'}"
    pretrain(1, f"{flags} {record}")
    found = RoutingTrace.load(tmp_path / "blocks.npz")
    lines = [json.loads(line) for line in (tmp_path / "routing.jsonl").read_text().splitlines()]
    assert [line["layer"] for line in lines] == list(found.blocks) == [2, 4]
    for line in lines:
        counts = numpy.bincount(found.blocks[line["layer"]].ravel(), minlength=64)
        assert counts.tolist() == line["tokens_per_block"]
    # Bytes of the validation part, in which every sample is a row of [s, b].
    data = numpy.fromfile(f"{text}.bin", dtype=numpy.uint16).tobytes()
    sample = found.token_ids[:128].reshape(64, 2)[:, 0].astype(numpy.uint16).tobytes()
    assert sample in data


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--skip-train --sffn-router dense", "dense chooses no blocks"),
        ("", "add --skip-train and --load"),
    ],
)
def test_recording_needs_an_evaluation_of_a_sparse_model(pretrain, flags: str, said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        pretrain(1, f"--train-iters 1 --split 90,10,0 --sffn-record-routing x.npz {flags}")


@pytest.mark.parametrize(
    ("flags", "said"),
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
    run: Path, tmp_path: Path, flags: str, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        analyze_routing.main([str(run), "--out", str(tmp_path), *flags.split()])


def test_a_dense_run_is_refused(pretrain, tmp_path: Path, start_tool) -> None:
    flags = "--train-iters 1 --save-interval 1 --split 90,10,0 --sffn-router dense"
    pretrain(1, f"{flags} --save {tmp_path / 'dense'}")
    process = start_tool("analyze_routing.py", tmp_path / "dense")
    _, errors = process.communicate(timeout=HANGS)
    assert process.returncode == 2
    assert len(errors.splitlines()) == 1
    assert "error:" in errors and "the run is dense" in errors
