"""Losses that are no numbers, and spikes: what Megatron's flags say happens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_sffn.checkpoints.files import iteration_folder, read_common, read_metadata
from megatron_sffn.checkpoints.rewrite import Change, rewrite
from megatron_sffn.train import nan_check
from tests.faults.jobs import EP2, Job, column, job

DENSE = "--sffn-router dense"
DIVERGING = "--train-iters 6 --lr 1e38"
"""After the first step the weights have this size."""


def ended(folder: Path, flags: str) -> tuple[Job, list[int]]:
    with job(2, flags, folder) as run:
        codes = run.wait()
    return run, codes


def with_norm(
    run: Path,
    iteration: int,
    folder: Path,
    change: Callable[[Tensor], Tensor],
    names: tuple[str, ...] = ("decoder.final_layernorm.weight", "final_layernorm.weight"),
) -> Path:
    """The run's checkpoint with another weight of a norm, of which there are 32 numbers."""
    source = iteration_folder(run, iteration)
    [norm] = [key for key in read_metadata(source).state_dict_metadata if key in names]
    changed = Change(piece=change, rows=(32, 32))
    rewrite(source, folder, iteration, changes={norm: changed}, common=read_common(source))
    return folder


@pytest.mark.parametrize("flags", ["", "--save saved --save-interval 9"])
def test_megatron_runs_the_step_again_and_leaves(tmp_path: Path, flags: str) -> None:
    run, codes = ended(tmp_path, f"{DENSE} {DIVERGING} {flags}")
    assert codes == [16, 16], run.log()  # EXIT_CODE_RESUME_TO_DISAMBIGUATE
    assert "found NaN in local forward loss calculation" in run.log(), run.log()
    assert list(column(run.log(), "lm loss")) == [1]


def test_without_the_rerun_it_leaves_at_once(tmp_path: Path) -> None:
    run, codes = ended(tmp_path, f"{DENSE} {DIVERGING} --rerun-mode disabled")
    assert codes == [1, 1]
    assert "found NaN in local forward loss calculation" in run.log(), run.log()
    assert list(column(run.log(), "lm loss")) == [1]


def test_without_the_check_it_goes_on(tmp_path: Path) -> None:
    run, codes = ended(tmp_path, f"{DENSE} {DIVERGING} --no-check-for-nan-in-loss-and-grad")
    assert codes == [0, 0], run.log()
    assert list(column(run.log(), "grad norm").values())[1:] == ["nan"] * 5


SCORES = "step 2, layer 1, router avg-k: scores are NaN or infinite; the hidden states"


@pytest.mark.parametrize(
    "flags",
    [
        "--overlap-grad-reduce",
        "--rerun-mode disabled --recompute-granularity full --recompute-method uniform "
        "--recompute-num-layers 1",
    ],
)
def test_scores_end_all_ranks_before_the_loss_does(tmp_path: Path, flags: str) -> None:
    run, codes = ended(tmp_path, f"{EP2} {DIVERGING} {flags}")
    assert codes == [1, 1]
    for rank in range(2):
        assert SCORES in run.log(rank), run.log(rank)
        assert "local forward loss" not in run.log(rank), run.log(rank)


@pytest.mark.parametrize(("factor", "said"), [(10.0, False), (0.1, True)])
def test_a_spike_is_said_and_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float, said: bool
) -> None:
    # No loss of 10 times the usual: at a tenth of it, every one is a spike.
    monkeypatch.setattr(nan_check, "SPIKE", factor)
    # 8 microbatches of a rank in each step: Megatron knows the usual loss after 100.
    flags = "--micro-batch-size 1 --global-batch-size 16 --train-iters 15 --check-for-spiky-loss"
    run, codes = ended(tmp_path, f"{DENSE} {flags}")
    assert codes == [0, 0], run.log()
    assert list(column(run.log(), "lm loss")) == list(range(1, 16))
    assert ("Spiky loss" in run.log()) is said, run.log()


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_weights_that_are_no_numbers_are_not_trained(tmp_path: Path, value: float) -> None:
    flags = f"{EP2} --train-iters 4 --save-interval 1"
    ended(tmp_path / "first", f"{flags} --exit-interval 2 --save {tmp_path / 'good'}")
    good, bad = tmp_path / "good", tmp_path / "bad"
    with_norm(good, 2, bad, lambda weight: torch.full_like(weight, value))
    run, codes = ended(tmp_path / "second", f"{flags} --save {bad} --load {bad}")
    assert codes == [1, 1]
    assert "the loss is nan in the first step, step 3" in run.log(), run.log()
    assert [path.name for path in bad.glob("iter_*")] == ["iter_0000002"]


def test_scores_of_one_stage_end_the_other_with_the_same_sentence(tmp_path: Path) -> None:
    flags = "--pipeline-model-parallel-size 2 --train-iters 4"
    good, bad = tmp_path / "good", tmp_path / "bad"
    ended(tmp_path / "first", f"{flags} --exit-interval 2 --save {good} --save-interval 4")
    norm = "decoder.layers.1.mlp.linear_fc1.layer_norm_weight"
    with_norm(good, 2, bad, lambda weight: torch.full_like(weight, torch.nan), (norm,))
    for more, when in (("", "step 3"), ("--skip-train", "evaluation after step 2")):
        run, codes = ended(tmp_path / when, f"{flags} --load {bad} {more}")
        assert codes == [1, 1], run.log()
        for rank in range(2):
            assert f"{when}, layer 2, router avg-k: scores are NaN" in run.log(rank), run.log(rank)
