"""GPT data: Megatron's data sets, a batch for each microbatch, and a check before anything starts.

Enters: `--data-path` and its relatives, `.bin/.idx` pairs. Leaves: iterators of token batches on
this rank's device. All index building, blending and sampling is Megatron's.
"""

from __future__ import annotations

import os
import struct
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset
from megatron.core.utils import get_batch_on_this_cp_rank, get_batch_on_this_tp_rank
from megatron.training import get_args, get_tokenizer
from megatron.training.utils import get_blend_and_blend_per_split
from torch import Tensor

from megatron_sffn.data.tokenizer import load_tokenizer
from megatron_sffn.errors import ConfigError

SAMPLED_TOKENS = 1 << 20
"""Tokens at each end of a data set that `check_data` compares with the vocabulary."""


def datasets_provider(*, on_every_stage: bool) -> Callable[..., Any]:
    """Megatron's datasets provider.

    Args:
        on_every_stage: whether all pipeline stages draw batches, or the first and the last alone.

    Returns:
        A function that builds train, validation and test sets of given sizes.
    """
    provider = partial(_build_datasets, _reads_anywhere if on_every_stage else _reads_at_the_ends)
    # Every rank builds its own view; Megatron otherwise builds on the first TP rank only.
    provider.is_distributed = True  # type: ignore[attr-defined]
    return provider


def _build_datasets(
    reads_data: Callable[[], bool], num_samples: tuple[int, int, int], vp_stage: int | None = None
) -> Any:
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=get_tokenizer(),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
    )
    kind = MockGPTDataset if args.mock_data else GPTDataset
    return BlendedMegatronDatasetBuilder(kind, num_samples, reads_data, config).build()


def _reads_anywhere() -> bool:
    """Whether this rank draws batches, if all stages do: it is its first TP rank."""
    return bool(mpu.get_tensor_model_parallel_rank() == 0)


def _reads_at_the_ends() -> bool:
    """The same, if only the first and the last stage do."""
    return _reads_anywhere() and bool(mpu.is_pipeline_first_stage() or mpu.is_pipeline_last_stage())


def next_batch(
    batches: Iterator[dict[str, Tensor]] | None, *, on_every_stage: bool
) -> dict[str, Any]:
    """This rank's part of the next microbatch.

    Args:
        batches: Megatron's data iterator; None on ranks that do not read.
        on_every_stage: as given to `datasets_provider`; the whole batch is then on every rank.

    Returns:
        `tokens`, `labels`, `loss_mask`, `position_ids` `[b, s]` and `attention_mask`, with None for
        what this pipeline stage does not have.
    """
    args = get_args()
    first, last = mpu.is_pipeline_first_stage(), mpu.is_pipeline_last_stage()
    names = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask")
    if not (first or last or on_every_stage):
        return dict.fromkeys(names)
    batch: dict[str, Any] = {}
    tp_rank = mpu.get_tensor_model_parallel_rank()
    if tp_rank == 0:
        assert batches is not None, "the first TP rank of a stage that reads data has no iterator"
        batch = {name: value.cuda(non_blocking=True) for name, value in next(batches).items()}
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=on_every_stage,  # Megatron's word for the whole batch on every TP rank
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=first,
        is_pipeline_last_stage=last,
    )
    batch = {name: batch.get(name) for name in names}
    if args.context_parallel_size > 1:
        batch = get_batch_on_this_cp_rank({**batch, "cu_seqlens": None}, is_hybrid_cp=False)
    return batch


def check_data(args: Namespace) -> None:
    """Look at tokenizer and data sets before any process group or file is made.

    Args:
        args: Megatron's validated namespace.

    Raises:
        ConfigError: if a file is missing, truncated, or holds ids outside the vocabulary.
    """
    vocab_size = load_tokenizer(args).vocab_size
    if args.mock_data:
        return
    try:
        blend, blend_per_split = get_blend_and_blend_per_split(args)
    except (AssertionError, KeyError, OSError, ValueError) as error:
        raise ConfigError(
            f"the data paths cannot be read ({type(error).__name__}: {error}); give --data-path "
            "PREFIX, or WEIGHT PREFIX for each of several, or files with such lists"
        ) from error
    blends = [blend] if blend else [one for one in blend_per_split or [] if one]
    if not blends:
        raise ConfigError(
            "no data set was given; pass --data-path PREFIX (of PREFIX.bin and PREFIX.idx, made by "
            "tools/preprocess_data.py) or --mock-data"
        )
    for prefixes, weights in blends:
        if weights and not all(weight > 0 for weight in weights):
            raise ConfigError(
                f"the weights {weights} of --data-path hold one that is not positive; "
                "leave out the data sets that are not to be read"
            )
        for prefix in prefixes:
            check_dataset(prefix, vocab_size)


def check_dataset(prefix: str, vocab_size: int) -> None:
    """Look at one `.bin/.idx` pair.

    Args:
        prefix: path without the ending.
        vocab_size: of the tokenizer that is to read it.

    Raises:
        ConfigError: if a file is missing or truncated, or an id is outside the vocabulary.
    """
    for ending in (".idx", ".bin"):
        if not os.path.exists(prefix + ending):
            raise ConfigError(
                f"data set {prefix + ending} does not exist; check --data-path, which is the path "
                "of PREFIX.bin and PREFIX.idx without the ending"
            )
    if os.path.getsize(prefix + ".bin") == 0:
        raise ConfigError(f"data set {prefix}.bin is empty; give it documents")
    _check_index(prefix + ".idx")
    dataset = IndexedDataset(prefix)
    tokens = int(dataset.sequence_lengths.sum())
    dtype = numpy.dtype(dataset.index.dtype)
    size, expected = os.path.getsize(prefix + ".bin"), tokens * dtype.itemsize
    if size != expected:
        raise ConfigError(
            f"data set {prefix}.bin has {size} bytes, but its index says {expected}; it is "
            "truncated or belongs to another index: make it again with tools/preprocess_data.py"
        )
    ids = numpy.memmap(prefix + ".bin", dtype=dtype, mode="r")
    ends = (ids[:SAMPLED_TOKENS], ids[-SAMPLED_TOKENS:])
    smallest, largest = min(int(end.min()) for end in ends), max(int(end.max()) for end in ends)
    if smallest < 0 or largest >= vocab_size:
        raise ConfigError(
            f"data set {prefix} holds token ids {smallest} to {largest}, but the tokenizer has "
            f"{vocab_size} ids; use the tokenizer that made the data set (--tokenizer-type, "
            "--tokenizer-model)"
        )


def _check_index(path: str) -> None:
    """The head of an `.idx` file is Megatron's, and the file as long as it says.

    `IndexedDataset` would notice too, but prints a second traceback when it is torn down.
    """
    head = struct.Struct("<9sQBQQ")  # magic, version, code of the dtype, sequences, documents
    with open(path, "rb") as file:
        start = file.read(head.size).ljust(head.size, b"\0")
    magic, version, code, sequences, documents = head.unpack(start)
    known = (magic, version) == (b"MMIDIDX\0\0", 1) and code in [dtype.value for dtype in DType]
    # A length and an offset for each sequence, and the first sequence of each document.
    if not known or os.path.getsize(path) != head.size + 12 * sequences + 8 * documents:
        raise ConfigError(
            f"data set index {path} is {'truncated' if known else 'no index'}; make the data set "
            "again with tools/preprocess_data.py"
        )
