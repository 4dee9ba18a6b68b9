"""The counts of `--sffn-hash-balance`: of a new run's data set, which has to fit its tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_sffn.train.hash_balance import counts_of_new_run
from megatron_sffn.utils.errors import ConfigError
from tests.support.preprocess_runs import VOCAB, namespace, write_dataset

RUN = "--seq-length 2 --micro-batch-size 1 --train-iters 1 --eval-iters 0"


def counts_with(balance: str) -> torch.Tensor | None:
    flags = f"{RUN} --sffn-router rand-hash --sffn-hash-balance {balance}"
    return counts_of_new_run(namespace(flags))


def test_every_id_of_the_data_set_is_counted(tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path / "text", [[3, 1, 3], [0, 3]])
    counts = counts_with(prefix)
    assert counts is not None
    assert torch.equal(counts, torch.tensor([1, 1, 0, 3]))


def test_a_run_without_the_flag_counts_nothing() -> None:
    assert counts_of_new_run(namespace(f"{RUN} --sffn-router rand-hash")) is None


@pytest.mark.parametrize(
    ("documents", "sentence"),
    [
        ([[]], f"text holds no ids, and the tokenizer has ids below {VOCAB}; give a data set"),
        ([[1, VOCAB]], f"text holds the id {VOCAB}, and the tokenizer has ids below {VOCAB}"),
    ],
)
def test_a_data_set_of_no_text_or_another_tokenizer_is_refused(
    tmp_path: Path, documents: list[list[int]], sentence: str
) -> None:
    prefix = write_dataset(tmp_path / "text", documents)
    with pytest.raises(ConfigError, match=rf"^--sffn-hash-balance \S+/{sentence}"):
        counts_with(prefix)


def test_a_missing_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"text\.idx does not exist; give the path of"):
        counts_with(f"{tmp_path}/text")
