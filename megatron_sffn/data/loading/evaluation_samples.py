"""The samples that every evaluation of a run reads.

Inputs: Megatron's validation and test sets. Outputs: data sets over them that restart at each
evaluation, so that a checkpoint has the same validation loss in every run.

Design notes:
- Megatron continues where the last evaluation ended. We keep its sampler, which asks for samples 0,
  1, 2, ..., and take the index modulo the size of an evaluation.
- Megatron's sampler for `--full-validation` gives each rank one sample at a time, and repeats
  samples if they do not fill all ranks. Here the last batch is filled with samples without a loss,
  so the loss does not depend on the number of ranks.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch
from megatron.core.datasets.utils import Split
from torch.utils.data import Dataset

from megatron_sffn.data.loading.index_cache import Sizes

PASSES = 1 << 20
"""Largest number of evaluations in a run."""


class EvaluationSamples(Dataset[dict[str, torch.Tensor]]):
    """The first samples of a data set, repeated for every evaluation.

    Args:
        dataset: Megatron's data set; if it has fewer samples, the last ones have no loss.
        size: samples of an evaluation.
        passes: number of repetitions.
    """

    split = Split.test
    """Megatron always uses `--eval-global-batch-size` for this split."""

    def __init__(self, dataset: Any, size: int, passes: int) -> None:
        self.dataset = dataset
        self.size = size
        self._count, self._passes = min(len(dataset), size), passes

    @property
    def is_full(self) -> bool:
        """True if every sample has a loss."""
        return self._count == self.size

    def __len__(self) -> int:
        return self.size * self._passes

    def __getitem__(self, sample: int) -> dict[str, torch.Tensor]:
        sample %= self.size
        item: dict[str, torch.Tensor] = self.dataset[sample % self._count]
        if sample < self._count:
            return item
        return {**item, "loss_mask": torch.zeros_like(item["loss_mask"])}


def evaluation_sizes(args: Namespace, sizes: Sizes) -> Sizes:
    """Numbers of samples that Megatron builds for training, validation and test.

    Args:
        args: Megatron's validated namespace.
        sizes: Megatron's numbers, which grow with the number of evaluations.
    """
    if args.sffn_validation_data == "next":
        return sizes
    size = args.sffn_eval_iters * args.eval_global_batch_size
    return (sizes[0], None if args.full_validation else size, size)


def evaluation_samples(args: Namespace, dataset: Any, split: Split, *, cyclic: bool) -> Any:
    """The data set that every evaluation reads.

    Args:
        args: Megatron's validated namespace.
        dataset: Megatron's data set, a list of several, or None.
        split: validation or test.
        cyclic: True if Megatron's sampler restarts at the end of the data set.
    """
    if isinstance(dataset, list):
        return [evaluation_samples(args, item, split, cyclic=cyclic) for item in dataset]
    if dataset is None or args.sffn_validation_data == "next":
        return dataset
    batch = args.eval_global_batch_size
    if args.full_validation and split is Split.valid:
        return EvaluationSamples(dataset, -(-len(dataset) // batch) * batch, 1)
    size = args.sffn_eval_iters * batch
    return EvaluationSamples(dataset, size, 1 if cyclic else PASSES) if size else dataset
