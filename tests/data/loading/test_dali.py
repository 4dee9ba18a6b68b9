"""DALI's batches are those of Megatron's torch loader: the same numbers, in the same order."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.datasets.utils import Split
from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator
from megatron.training.global_vars import set_global_variables, unset_global_variables
from megatron.training.training import (
    build_train_valid_test_data_iterators,
    update_train_iters,
)

from megatron_sffn.data.loading.dali import check_dali
from megatron_sffn.data.loading.gpt_dataset import datasets_provider
from megatron_sffn.utils.errors import ConfigError
from tests.support.preprocess_runs import namespace, random_documents, write_dataset
from tests.support.ranks import run_ranks

RUN = (
    "--seq-length 24 --micro-batch-size 2 --global-batch-size 8 --train-iters 12 --eval-iters 2 "
    "--eval-interval 6 --num-workers 0"
)
Batch = dict[str, torch.Tensor]

needs_dali = pytest.mark.skipif(
    importlib.util.find_spec("nvidia.dali") is None, reason="nvidia-dali is not installed"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With two data sets: `large` and `small`."""
    folder = tmp_path_factory.mktemp("sets")
    write_dataset(folder / "large", random_documents(600, 1))
    write_dataset(folder / "small", random_documents(200, 2))
    return folder


def drawn(flags: str, split: Split, consumed: int, most: int) -> list[Batch]:
    """What this rank draws from a split, through Megatron; the batches are held until the end."""
    warnings.simplefilter("ignore", UserWarning)  # torch's, of memory that it cannot pin
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    args = namespace(flags, rank=rank, ranks=ranks)
    unset_global_variables()
    unset_num_microbatches_calculator()
    set_global_variables(args)
    update_train_iters(args)
    args.iteration = consumed // args.global_batch_size
    args.consumed_train_samples = args.consumed_valid_samples = consumed
    provider = datasets_provider(on_every_stage=False)
    iterator = build_train_valid_test_data_iterators(provider)[split.value]
    if isinstance(iterator, list):  # several validation sets
        iterator = iterator[-1]
    draw = partial(next, iterator, None)
    return [batch for batch, _ in zip(iter(draw, None), range(most), strict=False)]


def compared(flags: str, split: Split, consumed: int, most: int) -> int:
    """How many batches of this rank are the same by both loaders; all that there are, or `most`."""
    torch_batches, dali_batches = (
        drawn(f"{flags} --sffn-dataloader {loader}", split, consumed, most)
        for loader in ("torch", "dali")
    )
    assert len(torch_batches) == len(dali_batches)
    for ours, theirs in zip(dali_batches, torch_batches, strict=True):
        theirs.pop("dataset_id", None)
        assert set(ours) == set(theirs)
        for name, value in theirs.items():
            assert ours[name].dtype == value.dtype, name
            assert torch.equal(ours[name], value), name
    return len(dali_batches)


EVERYTHING = "--reset-position-ids --reset-attention-mask --eod-mask-loss"


@needs_dali
@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (1, f"{EVERYTHING} --num-workers 2"),
        (2, f"{EVERYTHING} --num-workers 2"),
        (1, ""),
        (2, "--eod-mask-loss --no-create-attention-mask-in-dataloader --null-tokenizer-pad-id 7"),
        (1, "--reset-position-ids --no-mmap-bin-files --num-workers 1"),
        (1, "--reset-attention-mask --dataloader-defer-npy-index-mmap"),
    ],
)
def test_all_batches_of_a_blend_are_the_same(folder: Path, flags: str, ranks: int) -> None:
    flags = (
        f"{RUN} {flags} --data-path 3 {folder}/large 1 {folder}/small --split 80,10,10 "
        f"--data-cache-path {folder}/cache"
    )
    # 12 steps of 8 samples: more than the small set has, which begins anew.
    assert set(run_ranks(ranks, compared, flags, Split.train, 0, 1000)) == {96 // (2 * ranks)}


@needs_dali
def test_a_run_continues_within_an_epoch_on_another_number_of_ranks(folder: Path) -> None:
    flags = f"{RUN} --data-path {folder}/small --split 90,10,0 --sffn-dataloader dali"

    def tokens(consumed: int, most: int) -> list[Any]:
        return [batch["tokens"].tolist() for batch in drawn(flags, Split.train, consumed, most)]

    (whole,) = run_ranks(1, tokens, 0, 1000)
    first, second = run_ranks(2, tokens, 0, 10), run_ranks(2, tokens, 40, 1000)
    assert [batch for both in zip(*first, strict=True) for batch in both] == whole[:20]
    rest = [batch for both in zip(*second, strict=True) for batch in both]
    assert len(rest) >= 28
    assert rest == whole[20 : 20 + len(rest)]
    (alone,) = run_ranks(1, tokens, 40, 1000)
    assert alone == whole[20:]


@needs_dali
@pytest.mark.parametrize("split", [Split.valid, Split.test])
def test_evaluation_batches_are_the_same(folder: Path, split: Split) -> None:
    flags = f"{RUN} --data-path {folder}/large --split 60,20,20 --eval-micro-batch-size 4"
    assert min(run_ranks(2, compared, flags, split, 16, 40)) > 2


@needs_dali
@pytest.mark.parametrize(
    ("flags", "split"),
    [
        ("--dataloader-type cyclic", Split.train),
        ("--dataloader-type cyclic --no-data-sharding", Split.train),
    ],
)
def test_consecutive_passes_are_the_same(folder: Path, flags: str, split: Split) -> None:
    paths = f"--train-data-path {folder}/small --valid-data-path {folder}/small"
    assert run_ranks(2, passes, f"{RUN} {flags} {paths}", split) == [300, 300]


def passes(flags: str, split: Split) -> int:
    """Batches that are the same, over more than one pass."""
    return compared(flags, split, 0, 300)


@needs_dali
def test_growing_batch_sizes_are_the_same(folder: Path) -> None:
    flags = (
        "--seq-length 24 --micro-batch-size 2 --step-batch-size-schedule '0:4 1K:8' "
        f"--train-samples 96 --eval-iters 0 --num-workers 0 --data-path {folder}/large "
        "--split 100,0,0"
    )
    (count, _) = run_ranks(2, compared, flags, Split.train, 12, 1000)
    assert count >= (96 - 12) // 4


@needs_dali
def test_mock_data_is_the_same(folder: Path) -> None:
    assert run_ranks(1, compared, f"{RUN} {EVERYTHING} --mock-data", Split.train, 8, 20) == [20]


@needs_dali
def test_no_training_loader_without_training(folder: Path) -> None:
    flags = f"{RUN} --skip-train --data-path {folder}/large --split 80,10,10 --sffn-dataloader dali"

    def body() -> int:
        # More was consumed than this run would draw, which Megatron's sampler refuses.
        return len(drawn(flags, Split.valid, 10_000, 2))

    assert run_ranks(1, body) == [2]


@pytest.fixture(scope="module")
def asked() -> Namespace:
    """Of a run that wants DALI."""
    return namespace(f"{RUN} --mock-data --sffn-dataloader dali")


def test_missing_dali_is_one_sentence(asked: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)  # how Python marks an absent module
    with pytest.raises(ConfigError, match=r"pip install 'megatron-sffn\[dali\]'"):
        check_dali(asked)
    check_dali(Namespace(**{**vars(asked), "sffn_dataloader": "torch"}))


@needs_dali
def test_samples_without_a_loss_are_refused(asked: Namespace) -> None:
    with pytest.raises(ConfigError, match="--full-validation is not available with"):
        check_dali(Namespace(**{**vars(asked), "full_validation": True}))


@needs_dali
def test_phase_transitions_are_refused(asked: Namespace) -> None:
    check_dali(asked)
    with pytest.raises(ConfigError, match="--phase-transition-iterations is not available with"):
        check_dali(Namespace(**{**vars(asked), "phase_transition_iterations": [5]}))
