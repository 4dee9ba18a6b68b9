"""A checkpoint has one validation loss: in the run, afterwards, and on any layout."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.pretraining import Log, write_bytes
from tests.support.slow import slow

SWITCH = "--sffn-router switch --train-iters 8 --save run --save-interval 4"
EP2 = "--expert-model-parallel-size 2"
LAYOUTS = (
    (2, EP2),
    (4, "--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2"),
)


def losses(log: Log) -> dict[str, float]:
    """`4 on validation set` or `4` -> the loss that Megatron prints."""
    printed = re.findall(
        r"loss at iteration (\S+(?: on \w+ set)?) \| lm loss value: (\S+)", log.text
    )
    return {name: float(loss) for name, loss in printed}


def same_loss(loss: float) -> Any:
    """The same loss, summed in another order."""
    return pytest.approx(loss, rel=1e-6)


def summary(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "run" / "summary.json").read_text())
    return values


@pytest.mark.parametrize(
    "loader", ["single", slow("cyclic"), slow("single --sffn-dataloader dali")]
)
def test_every_evaluation_of_a_checkpoint_gives_the_same_loss(
    pretrain, tmp_path: Path, loader: str
) -> None:
    flags = f"{SWITCH} --split 60,30,10 --dataloader-type {loader}"
    run = losses(pretrain(1, f"{flags} --eval-interval 2"))
    assert run["8"] == same_loss(run["8 on validation set"])
    assert len({run[str(step)] for step in (2, 4, 6, 8)}) == 4
    curve = summary(tmp_path)["validation_curve"]
    assert [step for step, _ in curve] == [2, 4, 6, 8]
    assert [loss for _, loss in curve] == pytest.approx([run[str(s)] for s in (2, 4, 6, 8)], 1e-6)
    # Alone, with another number of steps, and in a run that goes on from step 4.
    for step in (4, 8):
        alone = pretrain(1, f"{flags} --load run --ckpt-step {step} --skip-train --train-iters 3")
        assert losses(alone)[f"{step} on validation set"] == same_loss(run[str(step)])
    resumed = losses(pretrain(1, f"{flags} --load run --ckpt-step 4 --eval-interval 3"))
    assert resumed["8 on validation set"] == same_loss(run["8"])
    assert [step for step, _ in summary(tmp_path)["validation_curve"]] == [2, 4, 6, 8]
    for ranks, layout in LAYOUTS:
        log = pretrain(ranks, f"{flags} --load run --skip-train {layout}")
        assert losses(log)["8 on validation set"] == pytest.approx(run["8"], rel=1e-5), layout


def test_validation_data_next_reads_new_samples_as_megatron_does(pretrain) -> None:
    flags = "--train-iters 4 --lr 1e-30 --split 60,30,10 --eval-interval 2"
    first_data, following_data = (
        losses(pretrain(1, f"{flags} --sffn-validation-data {data}")) for data in ("first", "next")
    )
    assert first_data["2"] == first_data["4"] == following_data["2"]
    assert following_data["4"] != following_data["2"]


def test_the_whole_validation_set_is_read_once_on_every_layout(pretrain, tmp_path: Path) -> None:
    flags = f"{SWITCH} --split 96,2,2 --full-validation"
    run = pretrain(1, f"{flags} --eval-interval 4")
    expected = summary(tmp_path)["validation_loss"]
    in_log = float(
        re.findall(r"validation-0 loss at iteration 8 on validation .*?value: (\S+)", run.text)[-1]
    )
    assert in_log == pytest.approx(expected, rel=1e-6)
    load = f"{SWITCH} --split 96,2,2 --load run --skip-train"
    for (ranks, layout), batch in zip(LAYOUTS, (4, 12), strict=True):
        pretrain(ranks, f"{load} --full-validation --eval-global-batch-size {batch} {layout}")
        assert summary(tmp_path)["validation_loss"] == pytest.approx(expected, rel=1e-5)


def test_every_validation_set_has_its_own_loss(pretrain, text: str, tmp_path: Path) -> None:
    def run(ranks: int, flags: str) -> dict[str, Any]:
        train = f"{SWITCH} --eval-interval 4 --full-validation --train-data-path {text}"
        pretrain(ranks, f"{train} {flags}", data="")
        return summary(tmp_path)

    folder = Path(__file__).parent
    first, second = (
        write_bytes(tmp_path / name, [folder / name])
        for name in ("test_checkpoints.py", "test_routing.py")
    )
    sets = f"--valid-data-path {first} {second} --multiple-validation-sets"
    first_loss = run(1, f"--valid-data-path {first}")["validation_loss"]
    unnamed = run(1, sets)
    set_losses = list(unnamed["validation_losses"].values())
    assert set_losses[0] == first_loss != set_losses[1]
    assert unnamed["validation_loss"] == pytest.approx(sum(set_losses) / 2)
    named = run(2, f"{sets} --validation-set-names web code {EP2}")["validation_losses"]
    assert named.keys() == {"web", "code"}
    assert list(named.values()) == pytest.approx(set_losses, rel=1e-4)
    blended = run(1, f"--valid-data-path {first} {second}")
    assert blended["validation_losses"] is None
    assert min(set_losses) < blended["validation_loss"] < max(set_losses)
