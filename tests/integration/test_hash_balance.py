"""`--sffn-hash-balance` in runs: layouts, and resume and export without the data set."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import megatron_sffn.hf  # noqa: F401 (tells transformers about our class)
from megatron_sffn.data.indexed.format import open_index
from megatron_sffn.hf.export import export
from megatron_sffn.nn.routers.balanced_map import balanced_map
from megatron_sffn.utils.hashing import hashed_subsets
from tests.hf.test_import import run_imports
from tests.support.megatron_models import logits_of
from tests.support.pretraining import MODEL, Log, run_pretraining

NUM_BLOCKS, NUM_ACTIVE, ROWS = 64, 16, 256
HASHED = "--sffn-router rand-hash --num-layers 4 --split 90,10,0"
LAYOUT = """
    --tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2
    --expert-model-parallel-size 2 --recompute-granularity full --recompute-method uniform
    --recompute-num-layers 1
"""


@pytest.fixture(scope="module")
def moved_text(text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the text, which a test deletes."""
    folder = tmp_path_factory.mktemp("moved")
    for ending in (".bin", ".idx"):
        shutil.copy(text + ending, folder / f"text{ending}")
    return folder


@pytest.fixture(scope="module")
def saved(
    text: str, moved_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Log, Path]:
    """A run of 4 steps, which saved step 2; the data set that balanced it does not exist any more.

    Returns its log and its folder.
    """
    folder = tmp_path_factory.mktemp("balanced")
    log = run_pretraining(1, f"{flags(moved_text)} --save run", data=text, folder=folder)
    shutil.rmtree(moved_text)
    return log, folder / "run"


def flags(text: Path) -> str:
    return f"{HASHED} --sffn-hash-balance {text}/text --train-iters 4 --save-interval 2"


def test_a_run_resumes_on_another_layout_without_the_data_set(
    text: str, saved: tuple[Log, Path], moved_text: Path, tmp_path: Path
) -> None:
    log, load = saved
    resumed = f"{flags(moved_text)} {LAYOUT} --load {load} --ckpt-step 2"
    losses = run_pretraining(4, resumed, data=text, folder=tmp_path).values("lm loss")
    assert losses == pytest.approx(log.values("lm loss")[2:], rel=1e-5)


def test_r5_a_new_run_is_the_same_on_another_layout(
    text: str, saved: tuple[Log, Path], tmp_path: Path
) -> None:
    new = f"{HASHED} --train-iters 4 --sffn-hash-balance {text} {LAYOUT}"
    losses = run_pretraining(4, new, data=text, folder=tmp_path).values("lm loss")
    assert losses == pytest.approx(saved[0].values("lm loss"), rel=1e-5)


def test_an_export_carries_the_map_and_computes_the_same(
    text: str, saved: tuple[Log, Path], tmp_path: Path
) -> None:
    _, load = saved
    export(load, tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    index = open_index(text)
    ids = torch.from_numpy(numpy.fromfile(index.bin, index.dtype).astype(numpy.int64))
    counts = torch.bincount(ids, minlength=ROWS)
    maps = [tensors[f"model.layers.{layer}.mlp.router.map"] for layer in range(4)]
    for layer, blocks_VK in enumerate(maps):
        sizes = {"num_blocks": NUM_BLOCKS, "num_active": NUM_ACTIVE}
        expected = balanced_map(counts, **sizes, key=42 * 1_000_003 + layer + 1)
        assert torch.equal(blocks_VK, expected)
        uniform = hashed_subsets(torch.arange(ROWS), size=NUM_BLOCKS, count=NUM_ACTIVE, key=layer)
        loads, uniform_loads = (
            torch.bincount(blocks[ids].flatten().long()).double() for blocks in (blocks_VK, uniform)
        )
        assert loads.max() / loads.mean() < 1.3 < uniform_loads.max() / uniform_loads.mean()
    assert not torch.equal(maps[0], maps[1])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokens = ids[:48].view(2, 24)
    with torch.no_grad():
        logits = model(tokens).logits
    expected_logits = logits_of(load, f"{MODEL} {HASHED} --sffn-hash-balance x", tokens)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-5, atol=1e-5)


def test_an_import_takes_the_map_of_an_export(saved: tuple[Log, Path], tmp_path: Path) -> None:
    export(saved[1], tmp_path / "hf")
    with pytest.raises(AssertionError, match="--sffn-hash-balance"):
        run_imports(tmp_path, ["--model hf --save run"])
    run_imports(tmp_path, ["--model hf --save run --sffn-hash-balance text"])
    export(tmp_path / "run", tmp_path / "again")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
