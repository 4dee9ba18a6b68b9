"""NaN losses, NaN scores and loss spikes, under Megatron's flags for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_sffn.checkpoints.files import iteration_folder, read_common, read_metadata
from megatron_sffn.checkpoints.rewrite import Change, rewrite
from megatron_sffn.train import nan_check
from tests.faults.jobs import EP2, Job, job, progress_column
from tests.support.slow import slow

DENSE = "--sffn-router dense"
DIVERGING = "--train-iters 6 --lr 1e38"
"""A learning rate that makes the weights overflow after the first step."""


def run_to_the_end(folder: Path, flags: str) -> tuple[Job, list[int]]:
    with job(2, flags, folder) as run:
        codes = run.wait()
    return run, codes


def rewrite_norm(
    run: Path,
    iteration: int,
    folder: Path,
    change: Callable[[Tensor], Tensor],
    names: tuple[str, ...] = ("decoder.final_layernorm.weight", "final_layernorm.weight"),
) -> Path:
    """Rewrite a checkpoint with another weight of a norm, which has 32 numbers."""
    source = iteration_folder(run, iteration)
    [norm] = [key for key in read_metadata(source).state_dict_metadata if key in names]
    norm_change = Change(piece=change, rows=(32, 32))
    rewrite(source, folder, iteration, changes={norm: norm_change}, common=read_common(source))
    return folder


@pytest.mark.parametrize("flags", [slow(""), "--save saved --save-interval 9"])
def test_a_nan_loss_makes_megatron_rerun_the_step_and_exit(tmp_path: Path, flags: str) -> None:
    run, codes = run_to_the_end(tmp_path, f"{DENSE} {DIVERGING} {flags}")
    assert codes == [16, 16], run.log()  # EXIT_CODE_RESUME_TO_DISAMBIGUATE
    assert "found NaN in local forward loss calculation" in run.log(), run.log()
    assert list(progress_column(run.log(), "lm loss")) == [1]


def test_without_the_rerun_a_nan_loss_ends_the_run_at_once(tmp_path: Path) -> None:
    run, codes = run_to_the_end(tmp_path, f"{DENSE} {DIVERGING} --rerun-mode disabled")
    assert codes == [1, 1]
    assert "found NaN in local forward loss calculation" in run.log(), run.log()
    assert list(progress_column(run.log(), "lm loss")) == [1]


def test_without_the_check_training_goes_on_with_nan(tmp_path: Path) -> None:
    run, codes = run_to_the_end(
        tmp_path, f"{DENSE} {DIVERGING} --no-check-for-nan-in-loss-and-grad"
    )
    assert codes == [0, 0], run.log()
    assert list(progress_column(run.log(), "grad norm").values())[1:] == ["nan"] * 5


SCORES = "step 2, layer 1, router avg-k: scores are NaN or infinite; the hidden states"


@pytest.mark.parametrize(
    "flags",
    [
        slow("--overlap-grad-reduce"),
        "--rerun-mode disabled --recompute-granularity full --recompute-method uniform "
        "--recompute-num-layers 1",
    ],
)
def test_nan_scores_end_all_ranks_before_the_loss_is_checked(tmp_path: Path, flags: str) -> None:
    run, codes = run_to_the_end(tmp_path, f"{EP2} {DIVERGING} {flags}")
    assert codes == [1, 1]
    for rank in range(2):
        assert SCORES in run.log(rank), run.log(rank)
        assert "local forward loss" not in run.log(rank), run.log(rank)


@pytest.mark.parametrize(("factor", "reported"), [(10.0, False), (0.1, True)])
def test_a_spike_is_reported_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float, reported: bool
) -> None:
    # No loss is 10 times the usual loss, and every loss is more than a tenth of it.
    monkeypatch.setattr(nan_check, "SPIKE", factor)
    # A rank has 8 microbatches per step, and Megatron knows the usual loss after 100 of them.
    flags = "--micro-batch-size 1 --global-batch-size 16 --train-iters 15 --check-for-spiky-loss"
    run, codes = run_to_the_end(tmp_path, f"{DENSE} {flags}")
    assert codes == [0, 0], run.log()
    assert list(progress_column(run.log(), "lm loss")) == list(range(1, 16))
    assert ("Spiky loss" in run.log()) is reported, run.log()


@pytest.mark.parametrize("value", [torch.inf, slow(torch.nan)])
def test_weights_with_nan_or_infinity_end_the_run_at_the_first_step(
    tmp_path: Path, value: float
) -> None:
    flags = f"{EP2} --train-iters 4 --save-interval 1"
    run_to_the_end(tmp_path / "first", f"{flags} --exit-interval 2 --save {tmp_path / 'good'}")
    source, changed = tmp_path / "good", tmp_path / "bad"
    rewrite_norm(source, 2, changed, lambda weight: torch.full_like(weight, value))
    run, codes = run_to_the_end(tmp_path / "second", f"{flags} --save {changed} --load {changed}")
    assert codes == [1, 1]
    assert "the loss is nan in the first step, step 3" in run.log(), run.log()
    assert [path.name for path in changed.glob("iter_*")] == ["iter_0000002"]


def test_nan_scores_of_one_stage_end_all_stages_with_the_same_sentence(tmp_path: Path) -> None:
    flags = "--pipeline-model-parallel-size 2 --train-iters 4"
    source, changed = tmp_path / "good", tmp_path / "bad"
    run_to_the_end(
        tmp_path / "first", f"{flags} --exit-interval 2 --save {source} --save-interval 4"
    )
    norm = "decoder.layers.1.mlp.linear_fc1.layer_norm_weight"
    rewrite_norm(source, 2, changed, lambda weight: torch.full_like(weight, torch.nan), (norm,))
    for extra_flags, moment in (("", "step 3"), ("--skip-train", "evaluation after step 2")):
        run, codes = run_to_the_end(tmp_path / moment, f"{flags} --load {changed} {extra_flags}")
        assert codes == [1, 1], run.log()
        for rank in range(2):
            assert f"{moment}, layer 2, router avg-k: scores are NaN" in run.log(rank), run.log(
                rank
            )
