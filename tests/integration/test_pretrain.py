"""The whole command: losses that fall, layouts that agree, runs that resume."""

from __future__ import annotations

import functools
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sffn.nn.routers import ROUTERS
from megatron_sffn.nn.routers.avg_k import AvgKRouter
from megatron_sffn.patches import registry
from tests.support.pretraining import Log, run_pretraining
from tests.support.slow import slow

EP2 = "--expert-model-parallel-size 2"
FP16 = "--fp16 --initial-loss-scale 1024"
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"


@pytest.fixture(scope="module")
def pretrain_one_rank(text: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Log]:
    """`pretrain_one_rank(flags)`: the log of a run on one rank, trained on first use."""

    @functools.cache
    def run(flags: str) -> Log:
        return run_pretraining(1, flags, data=text, folder=tmp_path_factory.mktemp("one_rank"))

    return run


def test_the_loss_curve_is_the_golden_one(pretrain, golden, fixed_text: str) -> None:
    log = pretrain(1, "--train-iters 20 --split 50,50,0", data=fixed_text)
    # The last digits of a sum depend on the processor, and a near tie may go the other way.
    golden("loss_avg_k", [round(loss, 4) for loss in log.values("lm loss")], tolerance=0.02)


ONE_CELL = "--sffn-block-size 1 --sffn-expansion 8"


LIKE_ANOTHER = (
    *("dense", "rand-hash", "vanilla-m", "top-k-act", "lorkm", "softmax-after", "softmax-before"),
    *("s-base", "noisy-top-k", "sigma-moe", "pkm-relu", "pkm-ffn"),
    "memory-plus",
)
"""Routers that score as avg-k, switch or pkm do, or that other tests of this module train."""


@pytest.mark.parametrize(
    "router", [slow(name) if name in LIKE_ANOTHER else name for name in ROUTERS]
)
def test_every_router_learns_on_two_ranks(pretrain, router: str) -> None:
    numbers = ROUTERS[router].test_numbers
    flags = f"--sffn-router {router} {ONE_CELL if numbers.single_cells else ''} {numbers.flags}"
    flags += "" if router == "dense" else f" {EP2}"
    log = pretrain(2, f"--train-iters 12 --split 90,10,0 {flags}")
    losses = log.values("lm loss")
    assert len(losses) == 12
    assert losses[-1] < losses[0] - 0.5
    assert log.validation_loss < losses[0] - 0.5


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        slow(2, EP2),
        slow(2, TP2),
        (2, "--pipeline-model-parallel-size 2"),
        slow(4, f"{TP2} --expert-model-parallel-size 4"),
        (2, f"{EP2} --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"),
        (2, f"{EP2} --recompute-granularity selective --recompute-modules moe"),
        (1, "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"),
        (4, f"{TP2} --expert-model-parallel-size 2 --expert-tensor-parallel-size 2"),
    ],
    ids=[
        "EP2",
        "TP2",
        "PP2",
        "TP2 EP4",
        "EP2 distributed optimizer",
        "EP2 moe recomputed",
        "full",
        "TP2 EP2 ETP2",
    ],
)
def test_a_layout_trains_the_same_model(
    pretrain, pretrain_one_rank, ranks: int, layout: str
) -> None:
    assert_same_run(pretrain(ranks, f"{SHORT} {layout}"), pretrain_one_rank(SHORT))


SHORT = "--train-iters 5 --split 90,10,0"


def assert_same_run(log: Log, expected: Log) -> None:
    """Losses to 4 digits, as the model is fp32 and Megatron's cross-entropy too."""
    for name in ("lm loss", "grad norm"):
        assert log.values(name) == pytest.approx(expected.values(name), rel=2e-3), name
    assert log.validation_loss == pytest.approx(expected.validation_loss, rel=1e-4)


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        slow(4, "--pipeline-model-parallel-size 4"),
        # A virtual stage of the first rank lies in the middle of the model.
        (
            2,
            "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 "
            "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
        ),
        slow(4, f"{TP2} --pipeline-model-parallel-size 2 {EP2}"),
    ],
    ids=["PP4", "PP2 VPP2 full", "TP2 PP2 EP2"],
)
def test_input_ids_reach_the_sparse_layers_of_every_stage(
    pretrain, pretrain_one_rank, ranks: int, layout: str
) -> None:
    hashed = f"{SHORT} --num-layers 4 --sffn-router rand-hash"
    assert_same_run(pretrain(ranks, f"{hashed} {layout}"), pretrain_one_rank(hashed))


@pytest.mark.parametrize(
    ("model", "ranks", "layout"),
    [
        ("--sffn-router dense --swiglu", 4, f"{TP2} --pipeline-model-parallel-size 2"),
        slow("--sffn-router dense --untie-embeddings-and-output-weights", 2, TP2),
        ("--sffn-router switch --sffn-backend megatron --swiglu", 2, EP2),
        slow("--sffn-router avg-k --sffn-backend megatron", 4, f"{TP2} {EP2}"),
        (
            "--num-attention-heads 4 --softmax-type learnable --init-method-std 0.5",
            4,
            f"{TP2} --pipeline-model-parallel-size 2",
        ),
    ],
    ids=["dense", "untied", "Megatron's experts", "Avg-K before Megatron's experts", "sinks"],
)
def test_baselines_are_the_same_on_every_layout(
    pretrain, model: str, ranks: int, layout: str
) -> None:
    flags = f"{SHORT} --num-layers 4 {model}"
    assert_same_run(pretrain(ranks, f"{flags} {layout}"), pretrain(1, flags))


def test_descriptors_cached_for_a_step_are_those_of_its_weights(pretrain, monkeypatch) -> None:
    flags = f"{SHORT} --eval-interval 2"
    cached = pretrain(1, flags)
    monkeypatch.setattr("megatron_sffn.train.run.set_weights_version", lambda *args: None)
    fresh = pretrain(1, flags)
    assert cached.values("lm loss") == fresh.values("lm loss")
    assert cached.values("lm loss value") == fresh.values("lm loss value")
    assert cached.validation_loss == fresh.validation_loss


def test_latent_layers_are_the_same_on_every_layout(pretrain) -> None:
    latent = f"{SHORT} --moe-latent-size 24 --sffn-gate sigmoid"
    log = pretrain(4, f"{latent} {TP2} --pipeline-model-parallel-size 2 {EP2}")
    assert_same_run(log, pretrain(1, latent))


def test_quantile_balancing_is_the_same_on_every_layout(pretrain) -> None:
    balanced = (
        f"{SHORT} --moe-router-load-balancing-type quantile_balancing "
        "--moe-router-quantile-balancing-ema 0.5"
    )
    log = pretrain(
        4,
        f"{balanced} {TP2} --pipeline-model-parallel-size 2 {EP2} --recompute-granularity full "
        "--recompute-method uniform --recompute-num-layers 1",
    )
    one_rank = pretrain(1, balanced)
    assert_same_run(log, one_rank)
    assert one_rank.values("lm loss") != pretrain(1, SHORT).values("lm loss")


def test_expert_bias_and_auxiliary_losses_are_the_same_on_every_layout(pretrain) -> None:
    balanced = (
        f"{SHORT} --sffn-router switch --moe-router-load-balancing-type seq_aux_loss "
        "--moe-aux-loss-coeff 0.1 --moe-z-loss-coeff 0.01 "
        "--moe-router-enable-expert-bias --moe-router-bias-update-rate 0.01"
    )
    log, one_rank = (
        pretrain(
            4,
            f"{balanced} {TP2} --pipeline-model-parallel-size 2 {EP2} --recompute-granularity full "
            "--recompute-method uniform --recompute-num-layers 1",
        ),
        pretrain(1, balanced),
    )
    assert_same_run(log, one_rank)
    for name in ("seq_load_balancing_loss", "z_loss"):
        assert len(one_rank.values(name)) == 5
        assert log.values(name) == pytest.approx(one_rank.values(name), rel=2e-3), name
    # There is no column for a loss that is off, and one line about the sum of Switch's gates.
    assert "| load_balancing_loss" not in one_rank.text
    assert one_rank.text.count("note: --sffn-router switch: the gates of the") == 1


@pytest.mark.parametrize(
    ("precision", "dispatcher"),
    [
        ("--bf16", "allgather"),
        slow("--bf16", "alltoall"),
        slow(FP16, "allgather"),
        (FP16, "alltoall"),
    ],
)
def test_models_in_half_precision_learn(pretrain, precision: str, dispatcher: str) -> None:
    layout = f"{TP2} --expert-model-parallel-size 2 --expert-tensor-parallel-size 2"
    log = pretrain(
        4,
        f"--train-iters 12 --split 90,10,0 {layout} {precision} "
        f"--moe-token-dispatcher-type {dispatcher}",
    )
    losses = log.values("lm loss")
    assert losses[-1] < losses[0] - 0.5
    assert log.values("number of nan iterations") == [0.0] * 12


def test_the_error_of_nan_scores_names_layer_router_and_step(pretrain, monkeypatch) -> None:
    calls = []

    def diverging(x: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        scores = x @ keys.mean(dim=1).T
        # 2 layers and 4 microbatches in a step: the second layer's in the third step.
        return scores / 0 if len(calls) == 18 else scores

    monkeypatch.setattr(AvgKRouter, "score", staticmethod(diverging))
    with pytest.raises(AssertionError, match="step 3, layer 2, router avg-k: scores are NaN"):
        pretrain(1, f"{SHORT}")


def test_the_run_says_which_names_are_no_longer_replaced(pretrain, monkeypatch) -> None:
    monkeypatch.setitem(registry.DROPPED, "megatron.core.name", "Megatron has the change")
    line = "no longer replaced: megatron.core.name (Megatron has the change)"
    assert line in pretrain(1, SHORT).text.splitlines()


def test_a_loss_scale_that_overflows_is_lowered_and_the_step_skipped(pretrain) -> None:
    log = pretrain(2, f"--train-iters 8 --split 90,10,0 {EP2} --fp16 --hysteresis 1")
    # Megatron starts at 2^32, far too high for these gradients.
    scales = log.values("loss scale")
    assert scales[0] > scales[-1]
    assert sum(log.values("number of skipped iterations")) > 0


def test_a_resumed_run_continues_bit_by_bit_with_dropout(pretrain, tmp_path: Path) -> None:
    flags = (
        f"--train-iters 6 --split 90,10,0 {EP2} --attention-dropout 0.1 --hidden-dropout 0.1 "
        "--save-interval 3"
    )
    undisturbed = pretrain(2, f"{flags} --save {tmp_path / 'whole'}")
    resumable = f"{flags} --save {tmp_path / 'parts'} --load {tmp_path / 'parts'}"
    first_run = pretrain(2, f"{resumable} --exit-interval 3")
    resumed = pretrain(2, resumable)
    assert len(first_run.values("grad norm")) == 3
    assert resumed.values("grad norm") == undisturbed.values("grad norm")[3:]
    assert resumed.values("lm loss") == undisturbed.values("lm loss")[3:]
    assert resumed.validation_loss == undisturbed.validation_loss
    summaries = [
        json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "parts")
    ]
    assert summaries[0]["validation_loss"] == summaries[1]["validation_loss"]
    loads = [(tmp_path / name / "routing.jsonl").read_text() for name in ("whole", "parts")]
    assert loads[0] == loads[1]


def test_the_weights_of_two_ranks_are_evaluated_on_one(pretrain, tmp_path: Path) -> None:
    flags = "--train-iters 3 --split 90,10,0 --save-interval 3"
    trained = pretrain(2, f"{flags} {EP2} --save {tmp_path}")
    evaluated = pretrain(1, f"{flags} --load {tmp_path} --skip-train --no-load-optim --no-load-rng")
    assert evaluated.validation_loss == pytest.approx(trained.validation_loss, rel=1e-5)


def assert_describes_the_run(summary: dict[str, Any], text: str) -> None:
    """The summary has what a comparison needs, with the values of `MODEL` and of the test."""
    command = shlex.split(summary["command"])
    assert command[:3] == ["python", "-m", "megatron_sffn.pretrain"]
    assert command[-2:] == ["--clip-grad", "0.5"]
    expected = {
        "model": {
            "num_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "seq_length": 64,
            "sparse_layers": 2,
            "params_dtype": "torch.float32",
            "position_embedding_type": "rope",
        },
        "sffn": {"block_size": 8, "expansion": 4, "shared_blocks": 0},
        "router_settings": {"descriptor": "mean"},
        "optimizer": {"optimizer": "adam", "lr": 3e-3, "clip_grad": 0.5, "weight_decay": 0.01},
        "batch": {"micro_batch_size": 2, "global_batch_size": 8, "train_iters": 4},
        "data": {
            "data_path": [text],
            "split": "80,10,10",
            "mock_data": False,
            "sffn_eval_iters": 2,
        },
        "tokenizer": {"tokenizer_type": "NullTokenizer", "vocab_size": 256},
        "started_from": {"load": None},
    }
    for section, values in expected.items():
        assert {name: summary[section][name] for name in values} == values
    assert summary["seed"] == 7


def test_a_run_writes_its_summary_and_its_routing_statistics(
    pretrain, text: str, tmp_path: Path
) -> None:
    log = pretrain(2, f"--train-iters 4 --split 80,10,10 {EP2} --seed 7 --clip-grad 0.5")
    folder = tmp_path / "runs" / "avg-k-g8-E4-seed7"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["validation_loss"] == pytest.approx(log.validation_loss, abs=1e-5)
    assert summary["test_loss"] != summary["validation_loss"]
    assert summary["iterations"] == 4
    assert summary["layout"]["expert"] == 2
    assert summary["tokens_per_second"] > 0
    assert_describes_the_run(summary, text)
    lines = [json.loads(line) for line in (folder / "routing.jsonl").read_text().splitlines()]
    assert [line["layer"] for line in lines[:2]] == [1, 2]
    # Two evaluations (validation, test) of 2 x 8 samples of 64 tokens, 16 blocks each.
    assert sum(lines[-1]["tokens_per_block"]) == 2 * 8 * 64 * 16


def test_masked_tokens_do_not_train_the_layers_of_multi_token_prediction(pretrain) -> None:
    # Spaces are ends of documents, which --eod-mask-loss leaves out of every loss.
    flags = f"{SHORT} --sffn-router dense --mtp-num-layers 1 --null-tokenizer-eod-id 32"
    plain, masked = (pretrain(1, f"{flags} {mask}") for mask in ("", "--eod-mask-loss"))
    assert masked.values("lm loss")[0] != plain.values("lm loss")[0]
    # The first step has the same weights: only the tokens that count differ.
    assert masked.values("mtp_1 loss")[0] != plain.values("mtp_1 loss")[0]
    assert masked.values("mtp_1 loss")[0] == pytest.approx(masked.values("lm loss")[0], rel=0.02)


PREDICTS_2 = (
    "--mtp-num-layers 2 --null-tokenizer-eod-id 32 --untie-embeddings-and-output-weights "
    "--position-embedding-type rope"
)


@pytest.mark.parametrize(
    ("router", "ranks", "layout"),
    [
        ("rand-hash", 4, f"{TP2} --pipeline-model-parallel-size 2 {EP2}"),
        slow("switch", 2, f"{EP2} --use-distributed-optimizer"),
        slow("avg-k", 2, "--pipeline-model-parallel-size 2"),
    ],
)
def test_sparse_layers_predict_further_tokens_on_every_layout(
    pretrain, pretrain_one_rank, tmp_path: Path, router: str, ranks: int, layout: str
) -> None:
    flags = f"{SHORT} {PREDICTS_2} --sffn-router {router}"
    log, expected = (
        pretrain(ranks, f"{flags} {layout} --save run --save-interval 9"),
        (pretrain_one_rank(flags)),
    )
    assert_same_run(log, expected)
    for name in ("mtp_1 loss", "mtp_2 loss"):
        assert log.values(name) == pytest.approx(expected.values(name), rel=1e-4), name
        assert log.values(name)[-1] < log.values(name)[0]
    # The layers are sparse ones of ours: their routing is counted after that of the model's two.
    lines = (tmp_path / "run" / "routing.jsonl").read_text().splitlines()
    assert {json.loads(line)["layer"] for line in lines} == {1, 2, 3, 4}
