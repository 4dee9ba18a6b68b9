"""GPT data: builds Megatron's data sets, and gets the batch of each microbatch.

Inputs: `--data-path` and related flags, `.bin/.idx` pairs that `checks/data.py` has checked.
Outputs: iterators of token batches on this rank's device.

Design notes:
- Megatron does all blending, sampling and computing of indices. `index_cache.py` writes the index
  files, and `dali.py` is the second loader.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.datasets.utils import Split
from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator
from megatron.core.utils import get_batch_on_this_cp_rank, get_batch_on_this_tp_rank
from megatron.training import get_args, get_tokenizer
from megatron.training.datasets.data_samplers import build_pretraining_data_loader
from megatron.training.global_vars import set_args
from megatron.training.training import get_train_valid_test_num_samples, update_train_iters
from megatron.training.utils import get_blend_and_blend_per_split
from torch import Tensor

from megatron_sffn.data.loading.dali import DaliLoader
from megatron_sffn.data.loading.evaluation_samples import evaluation_samples, evaluation_sizes
from megatron_sffn.data.loading.index_cache import Request, Sizes, complete_everywhere


def datasets_provider(*, on_every_stage: bool) -> Callable[..., Any]:
    """Megatron's datasets provider; with `--sffn-dataloader dali` it provides loaders.

    Args:
        on_every_stage: True if all pipeline stages draw batches; False if only the first and the
            last do.

    Returns:
        A function that builds train, validation and test sets of given sizes.
    """
    args = get_args()
    reads_data = _reads_on_any_stage if on_every_stage else _reads_on_end_stages
    provider: Any = partial(_build_datasets, reads_data, args.dataloader_type)
    if args.sffn_dataloader == "dali":
        provider = partial(_build_loaders, reads_data, args.dataloader_type)
        args.dataloader_type = "external"  # Megatron takes loaders as they are
    # Every rank builds its own view; Megatron otherwise builds on the first TP rank only.
    provider.is_distributed = True
    return provider


def _build_datasets(
    reads_data: Callable[[], bool], order: str, num_samples: Sizes, vp_stage: int | None = None
) -> tuple[Any, Any, Any]:
    """Megatron's data sets; those for validation and test restart at each evaluation.

    Args:
        reads_data: returns True if this rank draws batches.
        order: `--dataloader-type`, `single` or `cyclic`.
        num_samples: numbers of samples for training, validation and test.
        vp_stage: unused, since all virtual stages of a rank read the same batches.
    """
    args = get_args()
    request = dataset_request(args, get_tokenizer(), num_samples)
    if not args.dataloader_fast_cache_load:  # the flag promises that all index files exist
        complete_everywhere(request)
    builder = BlendedMegatronDatasetBuilder(request.kind, request.sizes, reads_data, request.config)
    train, valid, test = builder.build()
    cyclic = order == "cyclic"
    valid = evaluation_samples(args, valid, Split.valid, cyclic=cyclic)
    test = evaluation_samples(args, test, Split.test, cyclic=cyclic)
    if args.sffn_validation_data == "first":
        # Every evaluation starts at the first sample, also after a resume.
        args.consumed_valid_samples = 0
    if args.full_validation:
        args.sffn_validation_batches = _validation_batches(args, valid)
    return train, valid, test


def _validation_batches(args: Namespace, datasets: Any) -> list[int]:
    """Steps of an evaluation of each validation set, also on ranks that do not read it."""
    datasets = datasets if isinstance(datasets, list) else [datasets]
    sizes = [0 if dataset is None else dataset.size for dataset in datasets]
    # Ranks that do not read a split do not know the number of its data sets.
    num_datasets = torch.tensor(len(sizes), device=torch.cuda.current_device())
    torch.distributed.all_reduce(num_datasets, op=torch.distributed.ReduceOp.MAX)
    table = torch.zeros(int(num_datasets), dtype=torch.long, device=torch.cuda.current_device())
    table[: len(sizes)] = torch.tensor(sizes)
    torch.distributed.all_reduce(table, op=torch.distributed.ReduceOp.MAX)
    return [size // int(args.eval_global_batch_size) for size in table.tolist()]


def _build_loaders(
    reads_data: Callable[[], bool], order: str, num_samples: Sizes, vp_stage: int | None = None
) -> tuple[Any, Any, Any]:
    """DALI's loaders of the data sets, built and used like Megatron's loaders.

    Args:
        reads_data: returns True if this rank draws batches.
        order: `--dataloader-type`, `single` or `cyclic`.
        num_samples: numbers of samples for training, validation and test.
        vp_stage: unused, since all virtual stages of a rank read the same batches.
    """
    args = get_args()

    def loader(dataset: Any, consumed: int) -> Any:
        if isinstance(dataset, list):
            return [loader(item, consumed) for item in dataset]
        args.dataloader_type = order
        try:
            torch_loader = build_pretraining_data_loader(dataset, consumed)
        finally:
            args.dataloader_type = "external"
        if torch_loader is None:
            return None
        return DaliLoader(torch_loader, workers=args.num_workers, cyclic=order == "cyclic")

    train, valid, test = _build_datasets(reads_data, order, num_samples)
    from_the_start = args.skip_train or args.full_validation
    return (
        None if args.skip_train else loader(train, args.consumed_train_samples),
        loader(valid, 0 if from_the_start else args.consumed_valid_samples),
        loader(test, 0),
    )


def dataset_request(args: Namespace, tokenizer: Any, num_samples: Sizes) -> Request:
    """The class, sizes and config with which Megatron builds the data sets of a run.

    Args:
        args: Megatron's validated namespace.
        tokenizer: tokenizer of the run.
        num_samples: numbers of samples for training, validation and test.

    Raises:
        AssertionError, OSError, ValueError: Megatron does not accept the flags.
    """
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    sequences = None
    if args.per_dataset_sequences_path is not None:
        sequences = json.loads(Path(args.per_dataset_sequences_path).read_text())
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.sffn_separate_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=tokenizer,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        fast_cache_load=args.dataloader_fast_cache_load,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        sequences_per_dataset=sequences,
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
    )
    kind = MockGPTDataset if args.mock_data else GPTDataset
    return Request(kind=kind, sizes=evaluation_sizes(args, num_samples), config=config)


def samples_of_run(args: Namespace) -> Sizes:
    """Megatron's numbers of samples of a run, for training, validation and test.

    Args:
        args: Megatron's validated namespace, which becomes the global one of this process.
    """
    set_args(args)
    init_num_microbatches_calculator(
        rank=args.rank,
        global_batch_size=args.global_batch_size,
        micro_batch_size=args.micro_batch_size,
        data_parallel_size=args.data_parallel_size,
        step_batch_size_schedule=args.step_batch_size_schedule,
        seq_length=args.seq_length,
    )
    update_train_iters(args)
    sizes: Sizes = get_train_valid_test_num_samples()
    return sizes


def _reads_on_any_stage() -> bool:
    """True if this rank draws batches, where all stages do: the first TP ranks."""
    return bool(mpu.get_tensor_model_parallel_rank() == 0)


def _reads_on_end_stages() -> bool:
    """True if this rank draws batches, where only the first and the last stage do."""
    return _reads_on_any_stage() and bool(
        mpu.is_pipeline_first_stage() or mpu.is_pipeline_last_stage()
    )


def next_batch(
    batches: Iterator[dict[str, Tensor]] | None, *, on_every_stage: bool
) -> dict[str, Any]:
    """This rank's part of the next microbatch.

    Args:
        batches: Megatron's data iterator; None on ranks that do not read.
        on_every_stage: as for `datasets_provider`; if True, every rank gets the complete batch.

    Returns:
        `tokens`, `labels`, `loss_mask`, `position_ids` `[b, s]` and `attention_mask`; None for the
        tensors that this pipeline stage does not need.
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
        mtp_on_this_rank=on_every_stage,  # gives every TP rank the complete batch
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=first,
        is_pipeline_last_stage=last,
    )
    batch = {name: batch.get(name) for name in names}
    if args.context_parallel_size > 1:
        batch = get_batch_on_this_cp_rank({**batch, "cu_seqlens": None}, is_hybrid_cp=False)
    return batch
