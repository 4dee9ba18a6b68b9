"""`--sffn-router` with several routers: the whole command, its checkpoints and its table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.pretraining import Log

FLAGS = """
    --num-layers 4 --sffn-layers last:3 --train-iters 4 --split 90,10,0
    --sffn-router rand-hash:first:1,avg-k:1,switch --moe-router-enable-expert-bias
"""
LAYOUT = """
    --sffn-model hybrid --pipeline-model-parallel-size 2 --expert-model-parallel-size 2
    --tensor-model-parallel-size 2 --sequence-parallel
"""


def assert_same_losses(log: Log, expected: Log, first: int) -> None:
    for name in ("lm loss", "grad norm", "load_balancing_loss"):
        assert log.values(name) == pytest.approx(expected.values(name)[first:], rel=1e-5), name


def test_a_run_with_several_routers_goes_on_in_another_model_and_layout(
    pretrain, tmp_path: Path
) -> None:
    expected = pretrain(1, f"{FLAGS} --save gpt --save-interval 2")
    log = pretrain(4, f"{FLAGS} --load gpt --ckpt-step 2 {LAYOUT}")
    assert_same_losses(log, expected, first=2)
    assert "sparse feed-forward: switch (1) and rand-hash (1) and avg-k (1), " in expected.text
    summary = json.loads((tmp_path / "gpt/summary.json").read_text())
    assert summary["router"] == "rand-hash:first:1,avg-k:1,switch"
    records = (tmp_path / "gpt/routing.jsonl").read_text().splitlines()
    # Only the last layer has gates, and only it has a balance loss.
    gated = {record["layer"] for record in map(json.loads, records) if record["gate_mean"]}
    assert gated == {4}
    other = FLAGS.replace("avg-k:1", "avg-k:last:1").replace("rand-hash:first:1", "rand-hash:0")
    with pytest.raises(AssertionError, match=r"was saved with --sffn-router rand-hash:first:1"):
        pretrain(1, f"{other} --load gpt")
