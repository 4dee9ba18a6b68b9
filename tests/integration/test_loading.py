"""Loading in real runs: DALI, an index cache per node, and data for evaluation."""

from __future__ import annotations

import importlib.util
import os
import shlex
import sys
import warnings
from pathlib import Path

import pytest

from megatron_sffn.pretrain import main
from tests.support.pretraining import MODEL, Log
from tests.support.ranks import fork
from tests.support.slow import slow
from tools import build_index_cache

RUN = "--train-iters 6 --split 80,10,10"

needs_dali = pytest.mark.skipif(
    importlib.util.find_spec("nvidia.dali") is None, reason="nvidia-dali is not installed"
)


@needs_dali
def test_dali_trains_the_same_model_also_after_a_resume(
    pretrain, text: str, fixed_text: str, tmp_path: Path
) -> None:
    blend = f"2 {text} 1 {fixed_text} --split 50,25,25"

    def run(name: str, flags: str, ranks: int = 2) -> Log:
        folder = tmp_path / name
        flags = f"--train-iters 6 --save {folder} --load {folder} --save-interval 3 {flags}"
        return pretrain(ranks, flags, data=blend)

    torch = run("torch", "--eval-interval 3")
    dali = run("dali", "--eval-interval 3 --sffn-dataloader dali")
    for name in ("lm loss", "grad norm", "lm loss value"):
        assert dali.values(name) == torch.values(name), name
    assert len(torch.values("lm loss")) == 6
    assert len(torch.values("lm loss value")) == 4  # twice while it trains, validation, test
    run("parts", "--eval-interval 3 --sffn-dataloader dali --exit-interval 3 --num-workers 2")
    resumed = run("parts", "--eval-interval 3 --sffn-dataloader dali --num-workers 2")
    assert resumed.values("grad norm") == torch.values("grad norm")[3:]
    assert resumed.values("lm loss value") == torch.values("lm loss value")[1:]


# Fast: the same model after a resume; and PP2 with torch's loader.
@pytest.mark.slow
@needs_dali
def test_dali_trains_the_same_model_on_several_pipeline_stages(pretrain) -> None:
    layout = (
        f"{RUN} --num-layers 4 --pipeline-model-parallel-size 2 "
        "--num-layers-per-virtual-pipeline-stage 1 --tensor-model-parallel-size 2 "
        "--sequence-parallel --sffn-router rand-hash"
    )
    torch, dali = (
        pretrain(4, f"{layout} --sffn-dataloader {loader}") for loader in ("torch", "dali")
    )
    for name in ("lm loss", "lm loss value"):
        assert dali.values(name) == torch.values(name), name


def test_a_run_without_an_evaluation_interval_is_evaluated_after_training(
    pretrain, monkeypatch
) -> None:
    model = MODEL.replace("--eval-interval 1000", "")
    assert model != MODEL
    monkeypatch.setitem(pretrain.__globals__, "MODEL", model)
    log = pretrain(1, RUN)
    assert log.text.count("validation loss at iteration") == 2  # validation, test
    assert "validation loss at iteration 6 on validation set" in log.text


def test_evaluation_without_data_is_refused_at_the_start(pretrain, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="leaves nothing for validation, but --eval-iters 2"):
        pretrain(1, "--train-iters 2 --split 100,0,0 --save saved --save-interval 1")
    assert not (tmp_path / "saved").exists()
    assert len(pretrain(1, "--train-iters 2 --split 100,0,0 --eval-iters 0").values("lm loss")) == 2


def test_nodes_without_a_shared_disk_write_equal_index_caches(
    pretrain, monkeypatch, tmp_path: Path
) -> None:
    def main_on_node() -> None:
        node, local = divmod(int(os.environ["RANK"]), 2)
        os.environ["LOCAL_RANK"] = str(local)
        sys.argv += ["--data-cache-path", f"node{node}"]
        main()

    monkeypatch.setitem(pretrain.__globals__, "main", main_on_node)
    assert len(pretrain(4, RUN).values("lm loss")) == 6
    caches = [
        {path.name: path.read_bytes() for path in (tmp_path / f"node{node}").iterdir()}
        for node in (0, 1)
    ]
    assert len(caches[0]) == 12  # four files for each split
    assert caches[0] == caches[1]


@pytest.mark.parametrize("data", ["1 {a} 3 {b}", slow("{a} {b}")])
def test_a_run_reuses_the_index_cache_that_the_tool_wrote(
    pretrain, text: str, fixed_text: str, tmp_path: Path, data: str
) -> None:
    data = data.format(a=text, b=fixed_text)
    flags = f"--train-iters 6 --split 50,25,25 --data-cache-path {tmp_path / 'cache'}"

    def prebuild(rank: int, folder: Path) -> None:
        warnings.simplefilter("ignore")
        build_index_cache.main(shlex.split(f"--ranks 2 {MODEL} --data-path {data} {flags}"))

    fork(1, prebuild)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    assert len(written) == 3 * (4 + 4 + 3)
    pretrain(2, flags, data=data)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()} == written
