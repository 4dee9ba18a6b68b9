"""Megatron's HybridModel with sparse layers: the whole command, and checkpoints of a GPT."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from tests.support.pretraining import Log
from tests.support.slow import slow

FLAGS = "--num-layers 4 --sffn-layers 1,2 --train-iters 5 --split 90,10,0"
HYBRID = "--sffn-model hybrid"
PP2 = "--pipeline-model-parallel-size 2"
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"


def assert_same_run(log: Log, expected: Log) -> None:
    """Losses to 6 digits: both models compute the same products."""
    for name in ("lm loss", "grad norm", "load_balancing_loss"):
        assert log.values(name) == pytest.approx(expected.values(name), rel=1e-5), name
    assert log.validation_loss == pytest.approx(expected.validation_loss, rel=1e-6)


@pytest.mark.parametrize(
    ("router", "ranks", "layout"),
    [
        ("switch", 2, f"{PP2} --num-layers-per-virtual-pipeline-stage 1"),
        slow("switch", 1, ""),
        slow("rand-hash", 4, f"{PP2} {TP2} --expert-model-parallel-size 2 {FULL}"),
    ],
)
def test_a_hybrid_model_starts_and_trains_as_the_gpt(
    pretrain, router: str, ranks: int, layout: str
) -> None:
    flags = f"{FLAGS} --sffn-router {router}"
    expected, log = pretrain(1, flags), pretrain(ranks, f"{flags} {HYBRID} {layout}")
    assert_same_run(log, expected)
    assert expected.values("lm loss")[0] != expected.values("lm loss")[-1]


def test_a_stage_without_a_sparse_layer_logs_the_balance_loss_of_the_others(pretrain) -> None:
    expected = pretrain(1, f"{FLAGS} --sffn-layers 2 --sffn-router switch")
    pattern = "--num-layers 8 --sffn-layers every:1 --hybrid-layer-pattern *-*-|*E*-"
    assert_same_run(pretrain(2, f"{FLAGS} {pattern} --sffn-router switch {PP2}"), expected)


@pytest.mark.parametrize(
    ("flags", "ranks", "layout"),
    [
        ("--use-distributed-optimizer --sffn-router switch", 2, PP2),
        slow("--sffn-router rand-hash --swiglu", 1, ""),
        slow("--use-distributed-optimizer --sffn-router dense", 2, TP2),
    ],
)
def test_the_checkpoint_of_a_gpt_goes_on_in_a_hybrid_model(
    pretrain, flags: str, ranks: int, layout: str
) -> None:
    flags = f"{FLAGS} {flags}"
    expected = pretrain(1, f"{flags} --save gpt --save-interval 2")
    load = f"{flags} --load gpt --ckpt-step 2 {HYBRID} {layout}"
    log = pretrain(ranks, f"{load} --save hybrid --save-interval 4")
    for name in ("lm loss", "grad norm"):
        assert log.values(name) == pytest.approx(expected.values(name)[2:], rel=1e-5)
    # Its own checkpoint goes on with other stages.
    resumed = pretrain(1, f"{flags} --load hybrid --ckpt-step 4 {HYBRID}")
    assert resumed.values("lm loss") == pytest.approx(log.values("lm loss")[2:], rel=1e-6)
    with pytest.raises(AssertionError, match=r"--sffn-model gpt --num-layers 4 .* was saved with"):
        pretrain(1, f"{flags} --load hybrid")


PREDICTS = (
    "--hybrid-layer-pattern *E*-/*E*E/*E*E --sffn-layers every:1 --sffn-router switch "
    "--null-tokenizer-eod-id 32 --untie-embeddings-and-output-weights"
)


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (2, PP2),
        slow(4, f"{TP2} --expert-model-parallel-size 4"),
        slow(2, "--expert-model-parallel-size 2 --use-distributed-optimizer"),
    ],
)
def test_a_hybrid_model_predicts_further_tokens_on_every_layout(
    pretrain, tmp_path: Path, ranks: int, layout: str
) -> None:
    expected = pretrain(1, f"{FLAGS} {PREDICTS}")
    log = pretrain(ranks, f"{FLAGS} {PREDICTS} {layout} --save run --save-interval 9")
    assert_same_run(log, expected)
    for name in ("mtp_1 loss", "mtp_2 loss"):
        assert log.values(name) == pytest.approx(expected.values(name), rel=1e-5), name
    # Four layers, then four of each prediction.
    lines = (tmp_path / "run" / "routing.jsonl").read_text().splitlines()
    assert {json.loads(line)["layer"] for line in lines} == {2, 6, 8, 10, 12}


RECURRENT = (
    "--num-layers 4 --sffn-layers every:1 --sffn-router switch --train-iters 4 --split 90,10,0"
)
MAMBA = "--hybrid-layer-pattern ME*M --mamba-head-dim 8 --mamba-state-dim 16 --mamba-num-groups 2"
DELTA_NET = (
    "--hybrid-layer-pattern GE*G --swiglu --linear-num-key-heads 2 --linear-num-value-heads 4 "
    "--linear-key-head-dim 8 --linear-value-head-dim 8"
)
needs_einops = pytest.mark.skipif(
    importlib.util.find_spec("einops") is None, reason="Megatron's Mamba layer needs einops"
)


@pytest.mark.parametrize(
    ("pattern", "saved_on", "resumed_on"),
    [
        (DELTA_NET, (1, ""), (2, TP2)),
        pytest.param(
            *(MAMBA, (2, PP2), (2, f"{TP2} --bf16")),
            marks=[pytest.mark.slow, needs_einops],
        ),
        pytest.param(*(MAMBA, (2, TP2), (2, PP2)), marks=[pytest.mark.slow, needs_einops]),
    ],
)
def test_recurrent_layers_resume_on_another_layout(
    pretrain, pattern: str, saved_on: tuple[int, str], resumed_on: tuple[int, str]
) -> None:
    flags = f"{RECURRENT} {pattern}"
    precision = "--bf16" if "--bf16" in resumed_on[1] else ""
    expected = pretrain(1, f"{flags} {precision}")
    ranks, layout = saved_on
    first = pretrain(
        ranks, f"{flags} {precision} {layout} --save run --save-interval 2 --exit-interval 2"
    )
    ranks, layout = resumed_on
    log = pretrain(ranks, f"{flags} {layout} --load run")
    digits = 1e-2 if precision else 1e-5
    for name in ("lm loss", "grad norm"):
        values = first.values(name) + log.values(name)
        assert values == pytest.approx(expected.values(name), rel=digits), name
