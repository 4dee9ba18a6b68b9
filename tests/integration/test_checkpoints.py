"""Megatron's checkpoints: saved on one layout, continued on another as if nothing had happened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.pretraining import Log
from tests.support.slow import slow

EP2 = "--expert-model-parallel-size 2"
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
PP2 = "--pipeline-model-parallel-size 2"
LAYOUTS = {
    "one rank": (1, ""),
    "DP2": (2, ""),
    "EP2": (2, EP2),
    "TP2": (2, TP2),
    "TP2 ETP2": (2, f"{TP2} --expert-tensor-parallel-size 2"),
    "PP2": (2, PP2),
    "EP4": (4, "--expert-model-parallel-size 4"),
    "TP2 PP2 EP2": (4, f"{TP2} {PP2} {EP2}"),
    "PP2 VPP2": (2, f"{PP2} --num-layers-per-virtual-pipeline-stage 1"),
}
FLAGS = "--num-layers 4 --train-iters 6 --split 90,10,0 --save-interval 3"
SWITCH = "--sffn-router switch"
PRODUCT_KEYS = "--sffn-router pkm --sffn-block-size 1 --sffn-expansion 8 --sffn-product-key-size 16"
DISTRIBUTED = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"


@pytest.fixture
def saved(pretrain: Callable[..., Log], tmp_path: Path) -> Callable[..., tuple[Log, str]]:
    """`saved(layout, flags)`: an undisturbed run, and the flags that load its iteration 3."""

    def run(layout: str, flags: str) -> tuple[Log, str]:
        ranks, cut = LAYOUTS[layout]
        log = pretrain(ranks, f"{FLAGS} {cut} {flags} --save {tmp_path}/saved")
        return log, f"{FLAGS} {flags} --load {tmp_path}/saved --ckpt-step 3"

    return run


@pytest.mark.parametrize(
    ("source", "targets", "flags"),
    [
        slow("TP2 PP2 EP2", ["EP4", "one rank", "TP2 ETP2"], ""),
        ("TP2 PP2 EP2", ["EP4", "one rank", "TP2 ETP2"], DISTRIBUTED),
        (
            "one rank",
            ["TP2 PP2 EP2"],
            "--sffn-router switch --swiglu --moe-router-enable-expert-bias",
        ),
        slow("TP2 ETP2", ["EP2", "PP2 VPP2"], f"--sffn-router rand-hash --swiglu {DISTRIBUTED}"),
        slow("EP4", ["TP2", "DP2"], f"{SWITCH} --bf16 {DISTRIBUTED}"),
        slow(
            "TP2 PP2 EP2",
            ["EP4", "TP2 ETP2"],
            "--sffn-router sigma-moe --sffn-shared-blocks 2 --sffn-gate-network mlp "
            "--moe-router-enable-expert-bias",
        ),
        slow("EP2", ["TP2", "PP2"], f"{PRODUCT_KEYS} {DISTRIBUTED}"),
        slow("TP2 ETP2", ["EP4"], "--sffn-router lorkm --sffn-key-rank 16 --swiglu"),
        slow("EP2", ["TP2 ETP2"], "--sffn-descriptor ema --sffn-gate softmax"),
        # The first stage has no sparse layer, so no optimizer state of tables either.
        slow("PP2", ["EP2", "PP2"], "--sffn-layers 3"),
        ("PP2", ["EP2", "PP2"], f"--sffn-layers 3 {DISTRIBUTED}"),
    ],
)
def test_another_layout_goes_on_with_the_same_run(
    pretrain, saved, source: str, targets: list[str], flags: str
) -> None:
    log, load = saved(source, flags)
    tolerance = 2e-2 if "bf16" in flags else 1e-3
    for target in targets:
        ranks, cut = LAYOUTS[target]
        continued = pretrain(ranks, f"{load} {cut}")
        # The first two losses come as their mean: gradient norms stand for each.
        norms = continued.values("grad norm")
        assert norms == pytest.approx(log.values("grad norm")[3:], rel=tolerance), target
        assert continued.values("lm loss")[-1] == pytest.approx(
            log.values("lm loss")[-1], rel=tolerance
        )


@pytest.mark.parametrize("flags", [slow(""), DISTRIBUTED])
def test_the_same_layout_goes_on_bit_by_bit(pretrain, saved, flags: str) -> None:
    log, load = saved("TP2 PP2 EP2", flags)
    ranks, cut = LAYOUTS["TP2 PP2 EP2"]
    continued = pretrain(ranks, f"{load} {cut}")
    assert continued.values("grad norm") == log.values("grad norm")[3:]
    assert continued.values("lm loss")[-1] == log.values("lm loss")[-1]


@pytest.mark.parametrize("flags", [slow(""), DISTRIBUTED])
def test_another_learning_rate(pretrain, saved, flags: str) -> None:
    """The run's or the checkpoint's, as is said; in both groups, of dense weights and of tables."""
    log, load = saved("EP2", flags)
    assert log.values("learning rate") == [3e-3] * 6
    load = f"{load} {EP2} --lr 1e-3"
    anew = pretrain(2, f"{load} --override-opt-param-scheduler")
    assert anew.values("learning rate") == [1e-3] * 3
    assert anew.values("grad norm")[0] == log.values("grad norm")[3]
    assert anew.values("grad norm")[1] != log.values("grad norm")[4]
    same = pretrain(2, f"{load} --use-checkpoint-opt-param-scheduler")
    assert same.values("learning rate") == [3e-3] * 3
    assert same.values("grad norm") == log.values("grad norm")[3:]


def test_a_checkpoint_of_skipped_steps_goes_on(pretrain) -> None:
    # At first the loss scale overflows, and Adam has taken no step when the run is saved.
    flags = f"{FLAGS} {SWITCH} --fp16"
    whole = pretrain(1, flags)
    pretrain(1, f"{flags} --save cut --exit-interval 3")
    rest = pretrain(1, f"{flags} --load cut")
    assert rest.values("loss scale") == whole.values("loss scale")[3:]


def test_moments_that_were_never_used_are_saved_as_zeros(pretrain) -> None:
    # The loss scale fits from step 5 on: the steps after a checkpoint of step 3 are real ones.
    flags = f"{FLAGS} {SWITCH} --fp16 --initial-loss-scale 1048576"
    whole = pretrain(1, f"{flags} --train-iters 12")
    pretrain(1, f"{flags} --train-iters 12 --save run --exit-interval 3")
    rest = pretrain(1, f"{flags} --train-iters 12 --load run")
    assert 0 < sum(whole.values("number of skipped iterations")) < 12
    assert rest.values("grad norm")[-3:] == whole.values("grad norm")[-3:]
    assert rest.values("lm loss")[-1] == whole.values("lm loss")[-1]


def test_checkpoints_in_torchs_own_format_go_on(pretrain) -> None:
    flags = f"{FLAGS} {SWITCH} --ckpt-format torch"
    whole = pretrain(1, f"{flags} --save run")
    rest = pretrain(1, f"{flags} --load run --ckpt-step 3")
    assert rest.values("grad norm") == whole.values("grad norm")[3:]


def test_another_learning_rate_beside_a_decoupled_one(pretrain) -> None:
    flags = f"{FLAGS} {SWITCH} --decoupled-lr 1e-2"
    pretrain(1, f"{flags} --save run")
    load = f"{flags} --load run --ckpt-step 3 --lr 1e-3 --override-opt-param-scheduler"
    assert pretrain(1, load).values("learning rate") == [1e-3] * 3
