"""The tokenizer and the data sets of a run, as its flags name them.

Inputs: Megatron's validated namespace. Outputs: what the checks of the data look at, read once.
"""

from __future__ import annotations

import re
from argparse import Namespace
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.utils import Split

from megatron_sffn.data.indexed.blends import Blend, read_blends
from megatron_sffn.data.indexed.format import Index, open_index
from megatron_sffn.data.tokenize.tokenizer import Tokenizer, load_tokenizer

SHARES = re.compile(r"\s*[\d.]+(\s*[,/ ]\s*[\d.]+){0,2}\s*", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class SplitSource:
    """The data sets that one split reads.

    Args:
        split: training, validation or test.
        prefixes: prefixes of the data sets.
        weights: weights of the data sets in the blend; None if they are not weighted.
        share: where the split begins and ends in each data set, within 0 and 1.
    """

    split: Split
    prefixes: list[str]
    weights: list[float] | None
    share: tuple[float, float]

    def tokens(self, index: Index) -> int:
        """Tokens of a data set in this split, by Megatron's rounding to whole sequences."""
        first, last = (round(edge * index.num_sequences) for edge in self.share)
        return int(index.lengths[first:last].sum(dtype=numpy.int64))


class DataSource:
    """The tokenizer and the data sets of a run, each read when a check first asks for it.

    Args:
        args: Megatron's validated namespace.
    """

    def __init__(self, args: Namespace) -> None:
        self._args = args

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The run's tokenizer."""
        return load_tokenizer(self._args)

    @cached_property
    def blends(self) -> tuple[Blend | None, list[Blend | None]]:
        """The blend that all splits read, or a blend of each split."""
        shared, per_split = read_blends(self._args)
        return shared, per_split or []

    @cached_property
    def splits(self) -> list[SplitSource]:
        """Every split that reads data."""
        shared, per_split = self.blends
        shares = split_shares(self._args.split) if shared else [(0.0, 1.0)] * len(Split)
        return [
            SplitSource(split=split, prefixes=blend[0], weights=blend[1], share=share)
            for split, share, blend in zip(Split, shares, per_split or [shared] * 3, strict=True)
            if share is not None and blend
        ]

    @cached_property
    def indices(self) -> dict[str, Index]:
        """Prefix -> index, of every data set."""
        prefixes = [prefix for source in self.splits for prefix in source.prefixes]
        return {prefix: open_index(prefix) for prefix in dict.fromkeys(prefixes)}


def split_shares(split: str | None) -> list[tuple[float, float] | None]:
    """The range of each split in a data set that all splits share.

    Raises:
        AssertionError, FloatingPointError, TypeError, ValueError: if `split` cannot be read.
    """
    # Megatron reads the digits, whatever is between them: nan,1,1 is 1,1 and 1e2 is 1 and 2.
    if split is None or not SHARES.fullmatch(split):
        raise ValueError(split)
    with numpy.errstate(invalid="raise"):
        vector = parse_and_normalize_split(split)
    matrix: list[Any] = convert_split_vector_to_split_matrix(vector)
    return matrix
