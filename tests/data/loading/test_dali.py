"""DALI gives the batches of Megatron's torch loader: the same numbers in the same order."""

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
    """A folder with two data sets: `large` and `small`."""
    folder = tmp_path_factory.mktemp("sets")
    write_dataset(folder / "large", random_documents(600, 1))
    write_dataset(folder / "small", random_documents(200, 2))
    return folder


def draw_batches(flags: str, split: Split, consumed: int, max_batches: int) -> list[Batch]:
    """The batches that this rank draws from a split through Megatron, all held until the end."""
    warnings.simplefilter("ignore", UserWarning)  # torch warns that it cannot pin memory
    rank, num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    args = namespace(flags, rank=rank, ranks=num_ranks)
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
    return [batch for batch, _ in zip(iter(draw, None), range(max_batches), strict=False)]


def count_equal(flags: str, split: Split, consumed: int, max_batches: int) -> int:
    """Check that both loaders give this rank equal batches; returns how many were compared."""
    torch_batches, dali_batches = (
        draw_batches(f"{flags} --sffn-dataloader {loader}", split, consumed, max_batches)
        for loader in ("torch", "dali")
    )
    assert len(torch_batches) == len(dali_batches)
    for dali_batch, torch_batch in zip(dali_batches, torch_batches, strict=True):
        torch_batch.pop("dataset_id", None)
        assert set(dali_batch) == set(torch_batch)
        for name, value in torch_batch.items():
            assert dali_batch[name].dtype == value.dtype, name
            assert torch.equal(dali_batch[name], value), name
    return len(dali_batches)


ALL_MASK_FLAGS = "--reset-position-ids --reset-attention-mask --eod-mask-loss"


@needs_dali
@pytest.mark.parametrize(
    ("num_ranks", "flags"),
    [
        (1, f"{ALL_MASK_FLAGS} --num-workers 2"),
        (2, f"{ALL_MASK_FLAGS} --num-workers 2"),
        (1, ""),
        (2, "--eod-mask-loss --no-create-attention-mask-in-dataloader --null-tokenizer-pad-id 7"),
        (1, "--reset-position-ids --no-mmap-bin-files --num-workers 1"),
        (1, "--reset-attention-mask --dataloader-defer-npy-index-mmap"),
    ],
)
def test_all_batches_of_a_blend_are_the_same(folder: Path, flags: str, num_ranks: int) -> None:
    flags = (
        f"{RUN} {flags} --data-path 3 {folder}/large 1 {folder}/small --split 80,10,10 "
        f"--data-cache-path {folder}/cache"
    )
    # 12 steps of 8 samples are more than the small data set has, so its second epoch begins.
    assert set(run_ranks(num_ranks, count_equal, flags, Split.train, 0, 1000)) == {
        96 // (2 * num_ranks)
    }


@needs_dali
def test_a_run_continues_within_an_epoch_on_another_number_of_ranks(folder: Path) -> None:
    flags = f"{RUN} --data-path {folder}/small --split 90,10,0 --sffn-dataloader dali"

    def tokens(consumed: int, max_batches: int) -> list[Any]:
        return [
            batch["tokens"].tolist()
            for batch in draw_batches(flags, Split.train, consumed, max_batches)
        ]

    (undisturbed,) = run_ranks(1, tokens, 0, 1000)
    before_resume, after_resume = run_ranks(2, tokens, 0, 10), run_ranks(2, tokens, 40, 1000)
    assert [
        batch for rank_batches in zip(*before_resume, strict=True) for batch in rank_batches
    ] == undisturbed[:20]
    resumed = [batch for rank_batches in zip(*after_resume, strict=True) for batch in rank_batches]
    assert len(resumed) >= 28
    assert resumed == undisturbed[20 : 20 + len(resumed)]
    (resumed_on_one_rank,) = run_ranks(1, tokens, 40, 1000)
    assert resumed_on_one_rank == undisturbed[20:]


@needs_dali
@pytest.mark.parametrize("split", [Split.valid, Split.test])
def test_evaluation_batches_are_the_same(folder: Path, split: Split) -> None:
    flags = f"{RUN} --data-path {folder}/large --split 60,20,20 --eval-micro-batch-size 4"
    assert min(run_ranks(2, count_equal, flags, split, 16, 40)) > 2


@needs_dali
@pytest.mark.parametrize(
    ("flags", "split"),
    [
        ("--dataloader-type cyclic", Split.train),
        ("--dataloader-type cyclic --no-data-sharding", Split.train),
    ],
)
def test_consecutive_passes_give_the_same_batches(folder: Path, flags: str, split: Split) -> None:
    paths = f"--train-data-path {folder}/small --valid-data-path {folder}/small"
    assert run_ranks(2, count_over_passes, f"{RUN} {flags} {paths}", split) == [
        300,
        300,
    ]


def count_over_passes(flags: str, split: Split) -> int:
    """Compare the batches of more than one pass."""
    return count_equal(flags, split, 0, 300)


@needs_dali
def test_batches_of_growing_size_are_the_same(folder: Path) -> None:
    flags = (
        "--seq-length 24 --micro-batch-size 2 --step-batch-size-schedule '0:4 1K:8' "
        f"--train-samples 96 --eval-iters 0 --num-workers 0 --data-path {folder}/large "
        "--split 100,0,0"
    )
    (count, _) = run_ranks(2, count_equal, flags, Split.train, 12, 1000)
    assert count >= (96 - 12) // 4


@needs_dali
def test_batches_of_mock_data_are_the_same(folder: Path) -> None:
    assert run_ranks(1, count_equal, f"{RUN} {ALL_MASK_FLAGS} --mock-data", Split.train, 8, 20) == [
        20
    ]


@needs_dali
def test_a_run_without_training_builds_no_training_loader(folder: Path) -> None:
    flags = f"{RUN} --skip-train --data-path {folder}/large --split 80,10,10 --sffn-dataloader dali"

    def body() -> int:
        # Megatron's sampler refuses more consumed samples than this run would draw.
        return len(draw_batches(flags, Split.valid, 10_000, 2))

    assert run_ranks(1, body) == [2]


@pytest.fixture(scope="module")
def dali_args() -> Namespace:
    """The arguments of a run with DALI."""
    return namespace(f"{RUN} --mock-data --sffn-dataloader dali")


def test_a_missing_dali_is_reported_in_one_sentence(
    dali_args: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)  # how Python marks an absent module
    with pytest.raises(ConfigError, match=r"pip install 'megatron-sffn\[dali\]'"):
        check_dali(dali_args)
    check_dali(Namespace(**{**vars(dali_args), "sffn_dataloader": "torch"}))


@needs_dali
def test_full_validation_is_refused(dali_args: Namespace) -> None:
    with pytest.raises(ConfigError, match="--full-validation is not available with"):
        check_dali(Namespace(**{**vars(dali_args), "full_validation": True}))


@needs_dali
def test_phase_transitions_are_refused(dali_args: Namespace) -> None:
    check_dali(dali_args)
    with pytest.raises(ConfigError, match="--phase-transition-iterations is not available with"):
        check_dali(Namespace(**{**vars(dali_args), "phase_transition_iterations": [5]}))
