"""A run resumes from Megatron's checkpoints on another layout as if it had never stopped."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest

from tests.support.pretraining import Log, run_pretraining
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
FACTORS = "--sffn-lr-mult keys:2,values:2,gates:0.5 --sffn-wd-mult keys:0,values:0"
"""Keys and values have the same factors, and are groups of their own in spite of it."""
MUON = "--optimizer muon --muon-tp-mode duplicated --muon-fp32-matmul-prec high --lr 1e-2"
"""Muon of whole matrices on every layout, not rounded to bf16, so that layouts can be compared."""

MUON_OF_WHOLE_TENSORS = f"{MUON} --bf16 --use-distributed-optimizer"
"""The same, where each data-parallel rank has the state of some weights and tables."""


@pytest.fixture(scope="module")
def saved(
    text: str, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], tuple[Log, str]]:
    """`saved(layout, flags)`: an undisturbed run, and the flags that load its iteration 3.

    Tests with the same layout and flags share the run.
    """

    @functools.cache
    def run(layout: str, flags: str) -> tuple[Log, str]:
        ranks, layout_flags = LAYOUTS[layout]
        folder = tmp_path_factory.mktemp("saved")
        save = f"{FLAGS} {layout_flags} {flags} --save {folder}"
        log = run_pretraining(ranks, save, data=text, folder=folder)
        return log, f"{FLAGS} {flags} --load {folder} --ckpt-step 3"

    return run


@pytest.mark.parametrize(
    ("source", "targets", "flags"),
    [
        slow("TP2 PP2 EP2", ["EP4", "one rank", "TP2 ETP2"], ""),
        slow("TP2 PP2 EP2", ["EP4"], DISTRIBUTED),
        ("TP2 PP2 EP2", ["one rank", "TP2 ETP2"], DISTRIBUTED),
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
        ("EP2", ["TP2 ETP2"], "--moe-router-load-balancing-type quantile_balancing"),
        (
            "EP2",
            ["TP2 ETP2"],
            f"{SWITCH} --moe-latent-size 24 --sffn-layers-per-table 2 {FACTORS} {DISTRIBUTED}",
        ),
        # The coefficient of the loss doubles in each step: another one would show.
        ("EP2", ["TP2 ETP2"], "--sffn-router remoe --sffn-l1-coeff 0.1 --sffn-l1-multiplier 2"),
        # The first stage has no sparse layer, so no optimizer state of tables either.
        slow("PP2", ["EP2", "PP2"], "--sffn-layers 3"),
        slow("PP2", ["EP2", "PP2"], f"--sffn-layers 3 {DISTRIBUTED}"),
        ("EP2", ["TP2 ETP2"], f"{SWITCH} --swiglu {MUON}"),
        slow("TP2 PP2 EP2", ["one rank", "EP4"], f"{MUON} --sffn-layers 3"),
        slow("EP2", ["PP2"], f"{PRODUCT_KEYS} {MUON}"),
        slow("DP2", ["one rank", "EP2", "TP2 ETP2"], MUON_OF_WHOLE_TENSORS),
    ],
)
def test_another_layout_resumes_the_same_run(
    pretrain, saved, source: str, targets: list[str], flags: str
) -> None:
    log, load = saved(source, flags)
    tolerance = 2e-2 if "bf16" in flags else 1e-3
    for target in targets:
        ranks, layout_flags = LAYOUTS[target]
        resumed = pretrain(ranks, f"{load} {layout_flags}")
        # Megatron logs the first two losses as their mean, so gradient norms are compared instead.
        norms = resumed.values("grad norm")
        assert norms == pytest.approx(log.values("grad norm")[3:], rel=tolerance), target
        assert resumed.values("lm loss")[-1] == pytest.approx(
            log.values("lm loss")[-1], rel=tolerance
        )


@pytest.mark.parametrize(
    ("layout", "flags"),
    [
        slow("TP2 PP2 EP2", ""),
        ("TP2 PP2 EP2", DISTRIBUTED),
        slow("TP2 PP2 EP2", MUON),
        ("EP2", f"{MUON_OF_WHOLE_TENSORS} --muon-scalar-optimizer lion"),
    ],
)
def test_the_same_layout_resumes_bit_by_bit(pretrain, saved, layout: str, flags: str) -> None:
    log, load = saved(layout, flags)
    ranks, layout_flags = LAYOUTS[layout]
    resumed = pretrain(ranks, f"{load} {layout_flags}")
    assert resumed.values("grad norm") == log.values("grad norm")[3:]
    assert resumed.values("lm loss")[-1] == log.values("lm loss")[-1]


@pytest.mark.parametrize("flags", [slow(""), DISTRIBUTED])
def test_a_resumed_run_has_the_learning_rate_that_a_flag_chooses(
    pretrain, saved, flags: str
) -> None:
    """A flag chooses the rate of the run or of the checkpoint, for dense weights and tables."""
    log, load = saved("EP2", flags)
    assert log.values("learning rate") == [3e-3] * 6
    load = f"{load} {EP2} --lr 1e-3"
    overridden = pretrain(2, f"{load} --override-opt-param-scheduler")
    assert overridden.values("learning rate") == [1e-3] * 3
    assert overridden.values("grad norm")[0] == log.values("grad norm")[3]
    assert overridden.values("grad norm")[1] != log.values("grad norm")[4]
    from_checkpoint = pretrain(2, f"{load} --use-checkpoint-opt-param-scheduler")
    assert from_checkpoint.values("learning rate") == [3e-3] * 3
    assert from_checkpoint.values("grad norm") == log.values("grad norm")[3:]


def test_a_run_resumes_after_skipped_steps(pretrain, saved) -> None:
    # At first the loss scale overflows, and Adam has taken no step when the run is saved.
    undisturbed, load = saved("one rank", f"{SWITCH} --fp16")
    resumed = pretrain(1, load)
    assert resumed.values("loss scale") == undisturbed.values("loss scale")[3:]


def test_moments_that_were_never_used_are_saved_as_zeros(pretrain, saved) -> None:
    # The loss scale fits from step 5 on: the steps after a checkpoint of step 3 are real ones.
    flags = f"{SWITCH} --fp16 --initial-loss-scale 1048576 --train-iters 12"
    undisturbed, load = saved("one rank", flags)
    resumed = pretrain(1, load)
    assert 0 < sum(undisturbed.values("number of skipped iterations")) < 12
    assert resumed.values("grad norm")[-3:] == undisturbed.values("grad norm")[-3:]
    assert resumed.values("lm loss")[-1] == undisturbed.values("lm loss")[-1]


def test_muon_lowers_the_loss(saved) -> None:
    losses = saved("EP2", f"{SWITCH} --swiglu {MUON}")[0].values("lm loss")
    assert losses[-1] < losses[0] - 1


def test_a_run_resumes_from_a_checkpoint_in_torchs_own_format(pretrain, saved) -> None:
    undisturbed, load = saved("one rank", f"{SWITCH} --ckpt-format torch")
    resumed = pretrain(1, load)
    assert resumed.values("grad norm") == undisturbed.values("grad norm")[3:]


def test_a_resumed_run_can_change_the_learning_rate_beside_other_rates(pretrain, saved) -> None:
    log, load = saved("one rank", f"{SWITCH} --decoupled-lr 1e-2 {FACTORS}")
    kept = pretrain(1, load)
    assert kept.values("grad norm") == log.values("grad norm")[3:]
    override = "--override-opt-param-scheduler"
    resumed = pretrain(1, f"{load} --lr 1e-3 {override}")
    assert resumed.values("learning rate") == [1e-3] * 3
    # The last flag counts: the factors of this run are others.
    other = pretrain(1, f"{load} --lr 1e-3 {override} --sffn-lr-mult keys:1,values:9,gates:1")
    first, second = (run.values("grad norm") for run in (resumed, other))
    assert first[0] == second[0] == log.values("grad norm")[3]
    assert first[1] != second[1]
