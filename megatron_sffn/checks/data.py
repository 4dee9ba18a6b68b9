"""Flags of the data, tokenizer and data sets that cannot be used together.

Inputs: Megatron's validated namespace.

Design notes: Megatron would notice most of this as well, but after the model is built, after
training, or never: it searches a split without tokens for samples until it is killed.
"""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator
from itertools import combinations
from typing import Any

import numpy
from megatron.core.datasets.utils import Split
from numpy.typing import NDArray

from megatron_sffn.checks.data_source import DataSource, SplitSource, split_shares
from megatron_sffn.checks.problem import Problem, run_checks
from megatron_sffn.data.indexed.format import Index, open_index
from megatron_sffn.data.loading.dali import check_dali
from megatron_sffn.data.loading.gpt_dataset import dataset_request
from megatron_sffn.data.tokenize.tokenizer import difference_from_file
from megatron_sffn.flags.names import flag_of

SAMPLED_TOKENS = 1 << 20
"""Tokens at each end of a data set that are compared with the vocabulary."""

REFUSED = {
    "fim_data": ("text is trained on as it is written", ""),
    "sft": ("this is pretraining", "leave it out"),
    "dataloader_inter_document_masking": (
        "lengths of documents do not reach the attention",
        "use --reset-attention-mask",
    ),
    "hybrid_context_parallel": (
        "lengths of documents do not reach the attention",
        "leave it out",
    ),
    "rampup_batch_size": (
        "Megatron 0.19 reads it and does not act on it",
        "use --step-batch-size-schedule",
    ),
}
"""Megatron's flags (dest) that would have no effect -> the reason, and the remedy."""

PURPOSES = {Split.train: "training", Split.valid: "validation", Split.test: "testing"}

FLAGS_OF_DOCUMENT_ENDS = ("reset_position_ids", "reset_attention_mask", "eod_mask_loss")
"""Flags (dest) that act at the end of a document."""


def check_data(args: Namespace) -> None:
    """Look at flags, tokenizer and data sets before any process group or file is made.

    Args:
        args: Megatron's validated namespace.

    Raises:
        ConfigError: if a flag cannot be served; a file is missing, truncated, or holds ids outside
            the vocabulary; or a split lacks data.
    """
    source = DataSource(args)
    run_checks(CHECKS, args, source)
    if difference := difference_from_file(source.tokenizer, args.tokenizer_model):
        _warn(difference)
    if args.mock_data:
        return
    run_checks(DATA_SET_CHECKS, args, source)
    if args.split is None:
        _warn_of_overlaps(source.splits)
    _warn_without_ends(args, source)


def data_flags(args: Namespace, source: DataSource) -> Iterator[Problem]:
    """Flags of the data without an effect, and runs without a length."""
    for dest, (reason, remedy) in REFUSED.items():
        if getattr(args, dest):
            yield Problem(flag_of(dest), None, f"is not available, {reason}", remedy)
    if args.dataloader_type == "external":
        yield Problem(
            "--dataloader-type",
            "external",
            "takes batches that a caller made, and there is none here",
            "use single or cyclic",
        )
    if not (args.train_iters or args.train_samples):
        yield Problem(
            "--train-iters",
            None,
            "is missing, and the size of the data sets follows from it",
            "give it, for example --train-iters 1000, or --train-samples",
        )


def dali(args: Namespace, source: DataSource) -> Iterable[Problem]:
    """NVIDIA DALI where it is not installed, or with flags that it does not support."""
    check_dali(args)
    return ()


def vocabulary(args: Namespace, source: DataSource) -> Iterator[Problem]:
    """Embeddings with fewer rows than the tokenizer has ids."""
    rows, ids = args.padded_vocab_size, source.tokenizer.vocab_size
    if rows is not None and rows < ids:
        yield Problem(
            "--padded-vocab-size",
            rows,
            f"is less than the {ids} ids of the tokenizer",
            "leave it out, and Megatron pads",
        )


def split_flag(args: Namespace, source: DataSource) -> Iterator[Problem]:
    """Runs without data, and shares of `--split` that cannot be read or have no effect."""
    shared, per_split = source.blends
    if not shared and not any(per_split):
        yield Problem(
            "no data set",
            None,
            "was given",
            "pass --data-path PREFIX (of PREFIX.bin and PREFIX.idx, made by "
            "tools/preprocess_data.py) or --mock-data",
        )
    if not shared and args.split is not None:
        yield Problem(
            "--split",
            args.split,
            "has nothing to act on, since every split has data sets of its own",
            "leave it out",
        )
    try:
        if shared:
            split_shares(args.split)
    except (AssertionError, FloatingPointError, TypeError, ValueError):
        yield Problem(
            "--split",
            args.split,
            "is not given" if args.split is None else "cannot be used",
            "give the shares of training, validation and test, such as --split 98,1,1",
        )


def validation_sets(args: Namespace, source: DataSource) -> Iterator[Problem]:
    """Weights and names that do not fit the validation sets."""
    names = args.validation_set_names
    for split in source.splits:
        if split.split is not Split.valid:
            continue
        if args.full_validation and split.weights is not None:
            weights = " ".join(f"{weight:g}" for weight in split.weights)
            yield Problem(
                "--full-validation",
                None,
                f"reads each validation set once, so weights ({weights}) have nothing to act on",
                "give the sets by --valid-data-path and without weights",
            )
        if names and len(names) != len(split.prefixes):
            yield Problem(
                "--validation-set-names",
                names,
                f"has {len(names)} names, but --valid-data-path has {len(split.prefixes)} data "
                "sets",
                "give a name for each",
            )


def missing_splits(args: Namespace, source: DataSource) -> Iterator[Problem]:
    """Training or evaluation without data, which Megatron would miss only after training."""
    readers = {}
    if not args.skip_train:
        readers[Split.train] = ("the run trains", "use --skip-train")
    if args.full_validation:
        remedy = "leave that out and use --eval-iters 0"
        readers[Split.valid] = ("--full-validation reads it", remedy)
    elif args.eval_iters:
        readers[Split.valid] = (f"--eval-iters {args.eval_iters} reads it", "use --eval-iters 0")
    splits_with_data = [split.split for split in source.splits]
    for split, (reader, remedy) in readers.items():
        if split in splits_with_data:
            continue
        if args.split is None:
            rule = f"is not given, but {reader}"
            yield Problem(f"--{split.name}-data-path", None, rule, f"give it, or {remedy}")
        else:
            yield Problem(
                "--split",
                args.split,
                f"leaves nothing for {PURPOSES[split]}, but {reader}",
                f"give it a share, such as --split 98,1,1, or {remedy}",
            )


def token_ids(args: Namespace, source: DataSource) -> Iterator[Problem]:
    """Data sets that are missing, damaged or empty, or made with another tokenizer."""
    for index in source.indices.values():
        yield from _token_ids(index, source.tokenizer.vocab_size)


def check_dataset(prefix: str, vocab_size: int) -> Index:
    """Look at one `.bin/.idx` pair.

    Args:
        prefix: path without the ending.
        vocab_size: vocabulary size of the tokenizer that is to read it.

    Returns:
        Its index.

    Raises:
        ConfigError: if a file is missing or truncated, or an id is outside the vocabulary.
    """
    index = open_index(prefix)
    run_checks([_token_ids], index, vocab_size)
    return index


def _token_ids(index: Index, vocab_size: int) -> Iterator[Problem]:
    if not index.num_tokens:
        yield Problem("data set", index.bin, "is empty", "give it documents")
    sampled = _sampled_ids(index)
    smallest, largest = (
        min(int(ids.min()) for ids in sampled),
        max(int(ids.max()) for ids in sampled),
    )
    if smallest < 0 or largest >= vocab_size:
        yield Problem(
            "data set",
            index.prefix,
            f"holds token ids {smallest} to {largest}, but the tokenizer has {vocab_size} ids",
            "use the tokenizer that made the data set (--tokenizer-type, --tokenizer-model)",
        )


def split_sizes(args: Namespace, source: DataSource) -> Iterator[Problem]:
    """Splits of a data set that are shorter than one sequence and the token after it."""
    for split in source.splits:
        for prefix in split.prefixes:
            tokens = split.tokens(source.indices[prefix])
            if tokens > args.seq_length:
                continue
            too_few = (
                f"{tokens} tokens, and one sequence needs {args.seq_length + 1} (--seq-length and "
                "one)"
            )
            if args.split is None:
                yield Problem(
                    "data set",
                    prefix,
                    f"of --{split.split.name}-data-path has {too_few}",
                    "give a larger one, or leave it out",
                )
            yield Problem(
                "--split",
                args.split,
                f"leaves for {PURPOSES[split.split]}, of data set {prefix}, {too_few}",
                "give it a larger share, or 0",
            )


def dataset_config(args: Namespace, source: DataSource) -> Iterator[Problem]:
    """Flags that Megatron's data sets do not accept."""
    try:
        dataset_request(args, source.tokenizer, (0, 0, 0))
    except (AssertionError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        yield Problem(
            "Megatron", None, f"does not accept the flags of the data ({reason})", "change them"
        )


CHECKS = (data_flags, dali, vocabulary)
DATA_SET_CHECKS = (
    split_flag,
    validation_sets,
    missing_splits,
    token_ids,
    split_sizes,
    dataset_config,
)
"""Checks of runs that read data sets, not mock data."""


def _warn_of_overlaps(splits: list[SplitSource]) -> None:
    """Warn of a data set that is both trained on and held out."""
    for earlier, later in combinations(splits, 2):
        paths = {os.path.realpath(prefix) for prefix in earlier.prefixes}
        for prefix in later.prefixes:
            if os.path.realpath(prefix) in paths:
                _warn(
                    f"data set {prefix} is in --{earlier.split.name}-data-path and in "
                    f"--{later.split.name}-data-path, so {PURPOSES[later.split]} reads what "
                    f"{PURPOSES[earlier.split]} reads; hold parts out with tools/split_dataset.py"
                )


def _warn_without_ends(args: Namespace, source: DataSource) -> None:
    """Warn of flags that have no effect because no document has an end."""
    flags = [flag_of(dest) for dest in FLAGS_OF_DOCUMENT_ENDS if getattr(args, dest)]
    if not flags:
        return
    eod = source.tokenizer.eod
    for index in source.indices.values():
        if not any((ids == eod).any() for ids in _sampled_ids(index)):
            _warn(
                f"data set {index.prefix} does not hold the end-of-document id {eod} in its first "
                f"and last tokens, and {', '.join(flags)} act at it alone; make it with "
                "--append-eod"
            )


def _sampled_ids(index: Index) -> tuple[NDArray[Any], NDArray[Any]]:
    """The first and the last token ids of a data set."""
    ids = numpy.memmap(index.bin, dtype=index.dtype, mode="r")
    return ids[:SAMPLED_TOKENS], ids[-SAMPLED_TOKENS:]


def _warn(message: str) -> None:
    """Print one line on stderr, on one rank."""
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {message}", file=sys.stderr, flush=True)
