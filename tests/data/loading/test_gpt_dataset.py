"""Flags reach Megatron's data sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from megatron.core.datasets.gpt_dataset import GPTDataset, MockGPTDataset

from megatron_sffn.data.loading.gpt_dataset import dataset_request
from megatron_sffn.data.tokenize.tokenizer import load_tokenizer
from tests.support.preprocess_runs import namespace

RUN = "--seq-length 16 --micro-batch-size 1 --train-iters 1"
PATHS_PER_SPLIT = "--train-data-path a --valid-data-path b --data-cache-path cache"


@pytest.fixture(autouse=True)
def rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set RANK: Megatron's logging warns when it is not set."""
    monkeypatch.setenv("RANK", "0")


@pytest.mark.parametrize(
    ("flags", "field", "value"),
    [
        ("--data-path a --split 8,1,1", "split", "8,1,1"),
        ("--data-path 1 a 2 b --seed 7", "blend", (["a", "b"], [1.0, 2.0])),
        (PATHS_PER_SPLIT, "blend_per_split", [(["a"], None), (["b"], None), None]),
        (PATHS_PER_SPLIT, "path_to_cache", "cache"),
        (f"{PATHS_PER_SPLIT} --dataloader-fast-cache-load", "fast_cache_load", True),
        (f"{PATHS_PER_SPLIT} --dataloader-defer-npy-index-mmap", "defer_npy_index_mmap", True),
        ("--mock-data --mid-level-dataset-surplus 0.1", "mid_level_dataset_surplus", 0.1),
        ("--mock-data --allow-ambiguous-pad-tokens", "allow_ambiguous_pad_tokens", True),
        ("--mock-data --num-dataset-builder-threads 3", "num_dataset_builder_threads", 3),
        ("--mock-data --no-mmap-bin-files", "mmap_bin_files", False),
        ("--mock-data --reset-position-ids", "reset_position_ids", True),
        ("--mock-data --eod-mask-loss", "eod_mask_loss", True),
    ],
)
def test_a_flag_reaches_the_data_sets(flags: str, field: str, value: Any) -> None:
    args = namespace(f"{RUN} {flags}")
    request = dataset_request(args, load_tokenizer(args), (1, 2, 3))
    assert getattr(request.config, field) == value
    assert request.kind is (MockGPTDataset if "mock" in flags else GPTDataset)
    assert request.sizes == (1, 100, 100)  # --eval-iters batches of one


@pytest.mark.parametrize(
    ("flags", "sizes"),
    [
        ("--eval-iters 3 --global-batch-size 4", (9, 12, 12)),
        ("--eval-iters 3 --eval-global-batch-size 2", (9, 6, 6)),
        ("--sffn-validation-data next", (9, 8, 7)),
        ("--eval-iters 3 --full-validation", (9, None, 3)),
    ],
)
def test_evaluation_flags_decide_how_many_samples_are_built(flags: str, sizes: Any) -> None:
    args = namespace(f"{RUN} {PATHS_PER_SPLIT} {flags}")
    assert dataset_request(args, load_tokenizer(args), (9, 8, 7)).sizes == sizes


def test_sizes_in_a_file_reach_the_data_sets(tmp_path: Path) -> None:
    (tmp_path / "sizes.json").write_text(json.dumps({"a": [3, 4]}))
    args = namespace(
        f"{RUN} {PATHS_PER_SPLIT} --per-dataset-sequences-path {tmp_path / 'sizes.json'}"
    )
    request = dataset_request(args, load_tokenizer(args), (0, 0, 0))
    assert request.config.sequences_per_dataset == {"a": [3, 4]}
