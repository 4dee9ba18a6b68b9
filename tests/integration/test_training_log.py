"""Numbers of Megatron's progress lines that would be wrong without `patches/training_log.py`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.pretraining import Log

Run = Callable[..., Log]
BALANCED = (
    "--sffn-router switch --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2 "
    "--split 90,10,0"
)


def test_every_line_after_a_start_or_a_resume_has_the_losses_of_its_own_step(
    pretrain: Run, tmp_path: Path
) -> None:
    flags = f"{BALANCED} --train-iters 4 --save-interval 4"
    undisturbed = pretrain(1, f"{flags} --save {tmp_path / 'whole'}")
    saving = f"{flags} --save {tmp_path / 'cut'} --load {tmp_path / 'cut'}"
    runs = [pretrain(1, f"{saving} --exit-interval {last}") for last in (1, 4)]
    # The first run has one line, the second one three, of which the first two were mixed.
    for name in ("lm loss", "load_balancing_loss"):
        resumed = [value for run in runs for value in run.values(name)]
        assert resumed == undisturbed.values(name)
        assert len(resumed) == 4
    # With an interval of two steps a line has their mean, and the first step has a line of its own.
    wide = pretrain(1, f"{flags} --log-interval 2 --save {tmp_path / 'wide'}").values("lm loss")
    steps = undisturbed.values("lm loss")
    means = [steps[0], (steps[0] + steps[1]) / 2, (steps[2] + steps[3]) / 2]
    assert wide == pytest.approx(means, rel=2e-6)


def test_skipped_steps_count_in_no_loss(pretrain: Run) -> None:
    # At this scale fp16 overflows; each overflow halves it.
    flags = f"{BALANCED} --fp16 --initial-loss-scale {2**20} --hysteresis 1 --train-iters 12"
    log = pretrain(1, flags)
    skipped = [value == 1 for value in log.values("number of skipped iterations")]
    assert any(skipped) and not all(skipped), log.text
    lines = re.findall(r"^.* iteration +\d+/.*$", log.text, re.MULTILINE)
    for line, was_skipped in zip(lines, skipped, strict=True):
        assert ("loss: " in line) is not was_skipped, line
    wide = pretrain(1, f"{flags} --log-interval 6")
    for name in ("lm loss", "load_balancing_loss"):
        [last] = wide.values(name)[-1:]
        losses = log.values(name)[-sum(not step_was_skipped for step_was_skipped in skipped[6:]) :]
        assert last == pytest.approx(sum(losses) / len(losses), rel=1e-5), name


def test_the_norm_of_parameters_is_the_same_with_an_overlapped_gather(pretrain: Run) -> None:
    flags = (
        "--sffn-router avg-k --train-iters 3 --log-params-norm --use-distributed-optimizer "
        "--overlap-grad-reduce --split 90,10,0"
    )
    plain = pretrain(2, flags)
    overlapped = pretrain(2, f"{flags} --overlap-param-gather")
    assert overlapped.values("params norm") == plain.values("params norm")
    assert overlapped.values("lm loss") == plain.values("lm loss")
    assert not math.isclose(*plain.values("params norm")[::2])
