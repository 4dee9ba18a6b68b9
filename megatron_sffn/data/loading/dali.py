"""The NVIDIA DALI data loader: the batches of Megatron's torch loader, in the same order.

Inputs: Megatron's loader, with its data set, and its sampler, which knows the samples of this rank
and those that earlier runs consumed.
Outputs: an iterator over the same batches, on the GPU if there is one.

Design notes:
- Only token ids are copied to the GPU, as int32. The pipeline derives labels, loss mask, positions
  and attention mask, ahead of the step that reads them.
- `--num-workers` are threads: a read copies from a mapped file, during which numpy releases the
  GIL. DALI's own worker processes cannot be forked beside CUDA, and the complete mapped index would
  be sent to each.
- A checkpoint has no state of DALI: the sampler starts at the consumed samples, which is an exact
  resume on any number of ranks.
"""

from __future__ import annotations

from argparse import Namespace
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy
import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.training.training import cyclic_iter
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from megatron_sffn.data.loading.evaluation_samples import EvaluationSamples
from megatron_sffn.utils.errors import ConfigError, require

AHEAD = 2
"""Prefetched batches, in DALI and in each reading thread."""

Ids = NDArray[numpy.int32]
Read = list[Ids]
"""Ids `[b, s + 1]`, and with `Fields.restarts` the start of each token's document, `[b, s]`."""
Batch = dict[str, Tensor]
type Samples = GPTDataset | BlendedDataset | EvaluationSamples


def check_dali(args: Namespace) -> None:
    """Check that DALI is installed and supports the flags, with `--sffn-dataloader dali`.

    Args:
        args: Megatron's validated namespace.

    Raises:
        ConfigError: DALI is not installed, or does not support a flag.
    """
    if args.sffn_dataloader != "dali":
        return
    require("nvidia.dali", "--sffn-dataloader dali", "dali")
    if args.full_validation:
        raise ConfigError(
            "--full-validation is not available with --sffn-dataloader dali, which has no samples "
            "without a loss to fill the last batch; use --sffn-dataloader torch"
        )
    if args.phase_transition_iterations:
        raise ConfigError(
            "--phase-transition-iterations is not available with --sffn-dataloader dali, which "
            "counts samples from the start of the run; use --sffn-dataloader torch"
        )


class DaliLoader:
    """A loader for Megatron's `--dataloader-type external`.

    Args:
        loader: Megatron's loader, of which only data set and sampler are used.
        workers: threads that read ahead; 0: the pipeline waits for each read.
        cyclic: start another pass over the sampler after the last batch.
    """

    def __init__(self, loader: DataLoader[Any], *, workers: int, cyclic: bool) -> None:
        self._dataset, self._sampler = loader.dataset, loader.batch_sampler
        if isinstance(self._dataset, EvaluationSamples) and not self._dataset.is_full:
            raise ConfigError(
                f"an evaluation reads {self._dataset.size} sequences (--eval-iters times the batch "
                f"size), but its data has {len(self._dataset.dataset)}, and --sffn-dataloader dali "
                "reads whole batches alone; lower --eval-iters"
            )
        self._workers, self._cyclic = workers, cyclic
        self._batches: Iterator[Batch] | None = None

    def __len__(self) -> int:
        """Batches of a pass, by Megatron's sampler."""
        return len(self._sampler)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Batch]:
        """The batches of one pass."""
        fields = Fields.of(self._dataset)
        batches = read_ahead(self._dataset, self._sampler, fields, self._workers)
        return run_pipeline(batches, fields)

    def __next__(self) -> Batch:
        """The next batch; the first call starts the pipeline."""
        if self._batches is None:
            self._batches = cyclic_iter(self) if self._cyclic else iter(self)
        return next(self._batches)


@dataclass(frozen=True, kw_only=True)
class Fields:
    """The tensors of a batch and how they are derived: settings of Megatron's data set.

    Args:
        length: s, tokens of a sample.
        pad: id of padding.
        end: id of the end of a document.
        mask_end: no loss where the input is `end`.
        reset_positions: positions restart at 0 after an `end`.
        reset_attention: no attention across an `end`.
        attention_mask: batches have an attention mask.
    """

    length: int
    pad: int
    end: int | None
    mask_end: bool
    reset_positions: bool
    reset_attention: bool
    attention_mask: bool

    @classmethod
    def of(cls, dataset: Samples) -> Fields:
        """The settings of a data set; all data sets of a blend have the same."""
        if isinstance(dataset, EvaluationSamples):
            dataset = dataset.dataset
        while isinstance(dataset, BlendedDataset):
            dataset = dataset.datasets[0]
        config = dataset.config
        return cls(
            length=config.sequence_length,
            pad=dataset._pad_token_id,
            end=config.tokenizer.eod,
            mask_end=config.eod_mask_loss,
            reset_positions=config.reset_position_ids,
            reset_attention=config.reset_attention_mask,
            attention_mask=config.create_attention_mask,
        )

    @property
    def restarts(self) -> bool:
        """True if positions or attention restart at the start of a document."""
        return self.end is not None and (self.reset_positions or self.reset_attention)

    @property
    def names(self) -> list[str]:
        """Names of the tensors, in the order of the pipeline's outputs."""
        masks = ["attention_mask"] if self.attention_mask else []
        return ["tokens", "labels", "loss_mask", "position_ids", *masks]


def read_ahead(dataset: Samples, sampler: Any, fields: Fields, workers: int) -> Iterator[Read]:
    """Read batches ahead.

    Args:
        dataset: Megatron's data set.
        sampler: yields the list of samples of each batch.
        fields: tensors of the batches.
        workers: reading threads; 0: do not read ahead.
    """
    read = partial(read_batch, dataset, fields)
    if workers == 0:
        yield from map(read, sampler)
        return
    with ThreadPoolExecutor(workers) as pool:
        ahead: deque[Future[Read]] = deque()
        for samples in sampler:
            ahead.append(pool.submit(read, samples))
            if len(ahead) > AHEAD * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def read_batch(dataset: Samples, fields: Fields, samples: list[int]) -> Read:
    """Read the samples of one batch."""
    ids = numpy.stack([read_sample(dataset, sample) for sample in samples]).astype(numpy.int32)
    if not fields.restarts:
        return [ids]
    starts = numpy.zeros((len(samples), fields.length), numpy.int32)
    after = numpy.arange(1, fields.length, dtype=numpy.int32)
    ends = ids[:, : fields.length - 1] == fields.end
    numpy.maximum.accumulate(numpy.where(ends, after, 0), axis=1, out=starts[:, 1:])
    return [ids, starts]


def read_sample(dataset: Samples, sample: int) -> NDArray[numpy.int64]:
    """Token ids `[s + 1]` of a sample, padded by Megatron.

    `dataset[sample]` would also derive the other tensors, in Python.
    """
    if isinstance(dataset, EvaluationSamples):
        dataset, sample = dataset.dataset, sample % dataset.size
    while isinstance(dataset, BlendedDataset):
        if dataset.dataset_index is None:
            dataset[0]  # with --dataloader-defer-npy-index-mmap the first access maps the index
        number, sample = dataset.dataset_index[sample], dataset.dataset_sample_index[sample]
        dataset = dataset.datasets[number]
    ids: NDArray[numpy.int64] = dataset._query_document_sample_shuffle_indices(sample)[0]
    return ids


def run_pipeline(batches: Iterator[Read], fields: Fields) -> Iterator[Batch]:
    """Derive batches from token ids.

    Args:
        batches: batches of token ids, all of the same size.
        fields: tensors of the batches.

    Yields:
        `tokens`, `labels`, `position_ids` (int64) and `loss_mask` (fp32) `[b, s]`, and
        `attention_mask` (bool, true where attention is masked) `[b, 1, s, s]` if `fields` has it.
    """
    from nvidia.dali import Pipeline
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

    first = next(batches, None)
    if first is None:
        return
    pipeline = Pipeline(
        batch_size=len(first[0]),
        num_threads=1,
        # Without a GPU `torch.cuda` is patched (patches/cpu.py), and `torch.accelerator` is not.
        device_id=torch.cuda.current_device() if torch.accelerator.is_available() else None,
        prefetch_queue_depth=AHEAD,
        exec_dynamic=True,  # otherwise DALI overwrites a batch that is still in use
    )
    with pipeline:
        pipeline.set_outputs(*_derived(chain([first], batches), fields, pipeline.device_id))
    for (batch,) in DALIGenericIterator(pipeline, fields.names, prepare_first_batch=False):
        yield batch


def _derived(source: Iterator[Read], fields: Fields, device_id: int | None) -> list[Any]:
    """The pipeline's outputs, in the order of `Fields.names`, as `GPTDataset` derives them.

    A sample in DALI has no batch dimension.
    """
    from nvidia.dali import fn, newaxis
    from nvidia.dali.types import Constant, DALIDataType

    read = fn.external_source(
        source, num_outputs=2 if fields.restarts else 1, dtype=DALIDataType.INT32, ndim=1
    )
    device = "cpu"
    if device_id is not None:
        device, read = "gpu", [array.gpu() for array in read]
    positions = Constant(numpy.arange(fields.length, dtype=numpy.int32), device=device)
    ids, starts = read[0], read[-1]
    inputs, labels = ids[: fields.length], ids[1:]
    has_loss = labels != fields.pad
    if fields.mask_end and fields.end is not None:
        has_loss = has_loss & (inputs != fields.end)
    restart = fields.restarts and fields.reset_positions
    position_ids = positions - starts if restart else positions
    outputs = [
        fn.cast(inputs * (inputs != fields.pad), dtype=DALIDataType.INT64),
        fn.cast(labels * (labels != fields.pad), dtype=DALIDataType.INT64),
        fn.cast(has_loss, dtype=DALIDataType.FLOAT),
        fn.cast(position_ids, dtype=DALIDataType.INT64),
    ]
    if fields.attention_mask:
        mask = positions[newaxis, :] > positions[:, newaxis]
        if fields.restarts and fields.reset_attention:
            mask = mask | (positions[newaxis, :] < starts[:, newaxis])
        outputs.append(fn.expand_dims(mask, axes=0))
    return outputs
