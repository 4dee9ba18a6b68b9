"""The samples that every evaluation of a run reads.

Inputs: Megatron's validation and test sets. Outputs: data sets over them that begin again where an
evaluation ends, so that one checkpoint has one validation loss, whoever evaluates it.

Design notes: Megatron reads on where the last evaluation ended. Its sampler of batches is kept: it
asks for samples 0, 1, 2, ..., and these data sets take the index modulo the size of an evaluation.
Megatron's own sampler of `--full-validation` gives each rank one sample at a time, and repeats some
of them where the samples do not fill all ranks; here the last batch is filled with samples that
have no loss. One rank and many read the same.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch
from megatron.core.datasets.utils import Split
from torch.utils.data import Dataset

from megatron_sffn.data.loading.index_cache import Sizes

PASSES = 1 << 20
"""Evaluations of a run, at most."""


class EvaluationSamples(Dataset[dict[str, torch.Tensor]]):
    """The first samples of a data set, again and again.

    Args:
        dataset: Megatron's; where it has fewer samples, the others have no loss.
        size: samples of an evaluation.
        passes: how often they are repeated.
    """

    split = Split.test
    """For which Megatron makes batches of `--eval-global-batch-size`, whatever the flags are."""

    def __init__(self, dataset: Any, size: int, passes: int) -> None:
        self.dataset = dataset
        self.size = size
        self._count, self._passes = min(len(dataset), size), passes

    @property
    def is_full(self) -> bool:
        """Whether every sample has a loss."""
        return self._count == self.size

    def __len__(self) -> int:
        return self.size * self._passes

    def __getitem__(self, sample: int) -> dict[str, torch.Tensor]:
        place = sample % self.size
        item: dict[str, torch.Tensor] = self.dataset[place % self._count]
        if place < self._count:
            return item
        return {**item, "loss_mask": torch.zeros_like(item["loss_mask"])}


def evaluation_sizes(args: Namespace, sizes: Sizes) -> Sizes:
    """Samples that Megatron builds for training, validation and test.

    Args:
        args: validated.
        sizes: Megatron's, which grow with the number of evaluations.
    """
    if args.sffn_validation_data == "next":
        return sizes
    once = args.sffn_eval_iters * args.eval_global_batch_size
    return (sizes[0], None if args.full_validation else once, once)


def evaluation_samples(args: Namespace, dataset: Any, split: Split, *, cyclic: bool) -> Any:
    """What every evaluation of a data set reads.

    Args:
        args: validated.
        dataset: Megatron's; a list where there are several; None where there is none.
        split: which it is.
        cyclic: whether Megatron goes through it again at its end, by itself.
    """
    if isinstance(dataset, list):
        return [evaluation_samples(args, one, split, cyclic=cyclic) for one in dataset]
    if dataset is None or args.sffn_validation_data == "next":
        return dataset
    batch = args.eval_global_batch_size
    if args.full_validation and split is Split.valid:
        return EvaluationSamples(dataset, -(-len(dataset) // batch) * batch, 1)
    size = args.sffn_eval_iters * batch
    return EvaluationSamples(dataset, size, 1 if cyclic else PASSES) if size else dataset
