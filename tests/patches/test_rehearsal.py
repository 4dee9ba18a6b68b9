"""The path of a CUDA machine, simulated on the CPU: training starts, resumes, and is the same."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_sffn.patches import megatron, optimizer
from megatron_sffn.patches.cpu import is_host
from megatron_sffn.patches.registry import DROPPED
from tests.support.paths import ROOT
from tests.support.pretraining import MODEL, Log
from tests.support.slow import slow

pytestmark = pytest.mark.skipif(not is_host(), reason="this machine has CUDA: nothing to simulate")

EP2 = "--expert-model-parallel-size 2"
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
DISTRIBUTED = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
SHORT = "--train-iters 4 --split 90,10,0"


@pytest.fixture(scope="module")
def cuda_machine() -> Iterator[subprocess.Popen[str]]:
    """The program that simulates a CUDA machine, which has imported Megatron once."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("CUDA_DEVICE_MAX_CONNECTIONS", None)
    with subprocess.Popen(
        [sys.executable, "-m", "tests.patches.rehearsal"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def rehearse(
    cuda_machine: subprocess.Popen[str],
    text: str,
    tmp_path: Path,
) -> Callable[..., Any]:
    """`rehearse(ranks, flags)` pretrains on that machine, and returns the log."""

    def run(ranks: int, flags: str, *, without: str | None = None, fails: bool = False) -> Log:
        words = shlex.split(f"{MODEL} --data-path {text} --distributed-backend gloo {flags}")
        request = {"ranks": ranks, "flags": words, "folder": str(tmp_path), "without": without}
        print(json.dumps(request), file=cuda_machine.stdin, flush=True)
        answer = json.loads(cuda_machine.stdout.readline())
        assert answer["code"] is not None, f"the ranks hang\n{answer['log'][-3000:]}"
        assert (answer["code"] != 0) == fails, answer["log"][-3000:]
        return Log(text=answer["log"])

    return run


def assert_same_training(rehearsed: Log, host: Log) -> None:
    for name in ("lm loss", "grad norm"):
        assert len(rehearsed.values(name)) == 4
        assert rehearsed.values(name) == pytest.approx(host.values(name), rel=2e-3), name
    assert rehearsed.validation_loss == pytest.approx(host.validation_loss, rel=1e-4)


def test_the_run_takes_the_path_of_a_machine_without_transformer_engine(rehearse, pretrain) -> None:
    rehearsed = rehearse(1, SHORT)
    modules = "no Transformer Engine: Megatron's own modules, with --transformer-impl local"
    assert modules in rehearsed.text
    assert "training on the CPU" not in rehearsed.text
    assert_same_training(rehearsed, pretrain(1, SHORT))


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        slow(2, f"--sffn-router vanilla-m {TP2}"),
        (2, f"--sffn-router rand-hash {EP2} {DISTRIBUTED}"),
        slow(2, f"--sffn-router switch {EP2} --moe-token-dispatcher-type allgather"),
        (2, f"--sffn-router sigma-moe {TP2} {EP2} --normalization RMSNorm --swiglu"),
    ],
    ids=["vanilla-m TP2", "rand-hash EP2", "switch EP2", "sigma-moe TP2 EP2"],
)
def test_the_run_trains_the_model_of_a_cpu_host(
    rehearse,
    pretrain,
    ranks: int,
    flags: str,
) -> None:
    flags = f"{SHORT} {flags}"
    assert_same_training(rehearse(ranks, flags), pretrain(ranks, flags))


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        slow(1, "--sffn-router avg-k --bf16"),
        (2, f"--sffn-router switch {EP2} --bf16 {DISTRIBUTED}"),
        (2, f"--sffn-router avg-k {TP2} --fp16 --initial-loss-scale 1024"),
        slow(2, f"--sffn-router vanilla-m {EP2} --fp16 --initial-loss-scale 1024 {DISTRIBUTED}"),
    ],
    ids=["bf16", "bf16 EP2 distributed optimizer", "fp16 TP2", "fp16 EP2 distributed optimizer"],
)
def test_a_resumed_run_continues_bit_by_bit(
    rehearse, ranks: int, flags: str, tmp_path: Path
) -> None:
    flags += " --train-iters 6 --split 90,10,0"
    undisturbed = rehearse(ranks, f"{flags} --save {tmp_path / 'run'} --save-interval 3")
    resumed = rehearse(ranks, f"{flags} --load {tmp_path / 'run'} --ckpt-step 3")
    for name in ("lm loss", "grad norm"):
        assert len(undisturbed.values(name)) == 6
        assert resumed.values(name) == undisturbed.values(name)[3:]
    assert resumed.validation_loss == undisturbed.validation_loss


LR = "--use-checkpoint-opt-param-scheduler"
NEEDED_FOR: dict[str, tuple[int, str, str]] = {
    "megatron.core.datasets.utils.compile_helpers": (
        1,
        "",
        "Failed to compile the C++ dataset helper functions",
    ),
    "megatron.core.transformer.torch_norm.WrappedTorchNorm.__new__": (
        2,
        TP2,
        "sequence parallel not supported by torch LayerNorm",
    ),
    "megatron.core.transformer.dot_product_attention.DotProductAttention.__init__": (
        1,
        "--multi-latent-attention",
        "unexpected keyword argument 'k_channels'",
    ),
    "megatron.core.models.hybrid.hybrid_block.TENorm": (
        1,
        "--sffn-model hybrid",
        "Transformer Engine is not installed",
    ),
    "megatron.core.optimizer.optimizer.ChainedOptimizer.load_state_dict": (
        1,
        f"--lr 1e-3 {LR}",
        "error: Megatron does not start with these flags (Could not find parameter group",
    ),
    "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer.state_dict": (
        1,
        DISTRIBUTED,
        "assert len(steps) == 1",
    ),
    "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer."
    "_set_main_param_and_optimizer_states": (1, DISTRIBUTED, "KeyError: 'step'"),
}
"""Replaced name -> ranks and flags of a run that resumes, and without the replacement ends with
this error."""


NEEDED_TO_SAVE = {
    f"megatron.core.optimizer.optimizer.{name}.sharded_state_dict"
    for name in ("Float16OptimizerWithFloat16Params", "FP32Optimizer")
}
"""Names without which a checkpoint lacks moments (tests/integration/test_checkpoints.py)."""

NEEDED_TO_AGREE = {
    "megatron.core.transformer.multi_latent_attention.MLASelfAttention._qkv_down_projection"
}
"""Names without which layouts differ (tests/nn/distributed/test_training.py)."""

NEEDED_TO_PAIR = {
    f"megatron.core.optimizer.{module}.param_group_identifier_keys"
    for module in ("optimizer", "distrib_optimizer")
}
"""Names without which keys and values of equal rates are one group on resume
(tests/integration/test_checkpoints.py)."""


def test_every_replacement_for_every_machine_is_in_the_table() -> None:
    rows = [*megatron.PATCHES, *optimizer.PATCHES]
    needed = NEEDED_TO_SAVE | NEEDED_TO_AGREE | NEEDED_TO_PAIR | set(NEEDED_FOR)
    assert {row.target for row in rows} == needed


@pytest.mark.parametrize("target", [target for target in NEEDED_FOR if target not in DROPPED])
def test_without_a_replacement_training_fails(rehearse, target: str, tmp_path: Path) -> None:
    ranks, flags, error = NEEDED_FOR[target]
    saving = f"{SHORT} --save {tmp_path / 'run'} --load {tmp_path / 'run'} --save-interval 2"
    if target.startswith("megatron.core.optimizer"):
        flags_to_save = flags.replace(f"--lr 1e-3 {LR}", "")
        rehearse(ranks, f"{saving} {flags_to_save} --exit-interval 2")
    log = rehearse(ranks, f"{saving} {flags}", without=target, fails=True)
    assert error in log.text, log.text[-3000:]
    rehearse(ranks, f"{saving} {flags}")
