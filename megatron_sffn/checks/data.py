"""The look at flags, tokenizer and data sets before anything starts.

Enters: the validated namespace. Leaves: nothing, or one sentence. What is found here Megatron would
notice as well, but after the model is built, after training, or never: it looks for the samples of
a split without tokens until it is killed.
"""

from __future__ import annotations

import os
import re
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.utils import Split
from numpy.typing import NDArray

from megatron_sffn.data.indexed.blends import read_blends
from megatron_sffn.data.indexed.format import Index, open_index
from megatron_sffn.data.loading.dali import check_dali
from megatron_sffn.data.loading.gpt_dataset import dataset_request
from megatron_sffn.data.tokenize.tokenizer import Tokenizer, difference_from_file, load_tokenizer
from megatron_sffn.utils.errors import ConfigError

SAMPLED_TOKENS = 1 << 20
"""Tokens at each end of a data set that are compared with the vocabulary."""

REFUSED = {
    "fim_data": "text is trained on as it is written",
    "sft": "this is pretraining",
    "dataloader_inter_document_masking": "lengths of documents do not reach the attention; use "
    "--reset-attention-mask",
    "hybrid_context_parallel": "lengths of documents do not reach the attention",
    "rampup_batch_size": "Megatron 0.19 reads it and does not act on it; use "
    "--step-batch-size-schedule",
}
"""Megatron's flags (dest) that would have no effect -> why."""

SHARES = re.compile(r"\s*[\d.]+(\s*[,/ ]\s*[\d.]+){0,2}\s*", re.ASCII)
PURPOSES = {Split.train: "training", Split.valid: "validation", Split.test: "testing"}


USES_OF_ENDS = ("reset_position_ids", "reset_attention_mask", "eod_mask_loss")
"""Flags (dest) that act at the end of a document."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one split reads.

    Args:
        split: which.
        prefixes: of its data sets.
        share: of each of them, from and to, within 0 and 1.
    """

    split: Split
    prefixes: list[str]
    share: tuple[float, float]

    def tokens(self, index: Index) -> int:
        """How many it gets of a data set, by Megatron's rounding to whole sequences."""
        first, last = (round(edge * index.num_sequences) for edge in self.share)
        return int(index.lengths[first:last].sum(dtype=numpy.int64))


def check_data(args: Namespace) -> None:
    """Look at flags, tokenizer and data sets before any process group or file is made.

    Args:
        args: Megatron's validated namespace.

    Raises:
        ConfigError: if a flag cannot be served; a file is missing, truncated, or holds ids outside
            the vocabulary; or a split lacks data.
    """
    _check_flags(args)
    check_dali(args)
    tokenizer = load_tokenizer(args)
    if args.padded_vocab_size is not None and args.padded_vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            f"--padded-vocab-size {args.padded_vocab_size} is less than the {tokenizer.vocab_size} "
            "ids of the tokenizer; leave it out, and Megatron pads"
        )
    if difference := difference_from_file(tokenizer, args.tokenizer_model):
        _warn(difference)
    if args.mock_data:
        return
    parts = list(_parts(args))
    _check_uses(args, parts)
    prefixes = dict.fromkeys(prefix for part in parts for prefix in part.prefixes)
    indices = {prefix: check_dataset(prefix, tokenizer.vocab_size) for prefix in prefixes}
    for part in parts:
        for prefix in part.prefixes:
            _check_size(args, part, prefix, part.tokens(indices[prefix]))
    if args.split is None:
        _warn_of_overlaps(parts)
    _warn_without_ends(args, tokenizer, list(indices.values()))
    try:
        dataset_request(args, tokenizer, (0, 0, 0))
    except (AssertionError, OSError, ValueError) as error:
        raise ConfigError(
            f"Megatron does not accept the flags of the data ({' '.join(str(error).split())}); "
            "change them"
        ) from error


def _check_flags(args: Namespace) -> None:
    """Every flag has an effect, and the length of the run is known."""
    for dest, why in REFUSED.items():
        if getattr(args, dest):
            raise ConfigError(f"--{dest.replace('_', '-')} is not available, {why}")
    if args.dataloader_type == "external":
        raise ConfigError(
            "--dataloader-type external takes batches that a caller made, and there is none here; "
            "use single or cyclic"
        )
    if not (args.train_iters or args.train_samples):
        raise ConfigError(
            "--train-iters is missing, and the size of the data sets follows from it; give it, for "
            "example --train-iters 1000, or --train-samples"
        )


def _parts(args: Namespace) -> Iterator[Part]:
    """Every split that reads anything."""
    blend, blend_per_split = read_blends(args)
    blends = [blend] if blend else [one for one in blend_per_split or [] if one]
    if not blends:
        raise ConfigError(
            "no data set was given; pass --data-path PREFIX (of PREFIX.bin and PREFIX.idx, made by "
            "tools/preprocess_data.py) or --mock-data"
        )
    shares = _shares(args.split, shared=bool(blend))
    for split, share, own in zip(Split, shares, blend_per_split or [blend] * 3, strict=True):
        if share is not None and own:
            if args.full_validation and split is Split.valid and own[1] is not None:
                raise ConfigError(
                    "--full-validation reads each validation set once, so weights "
                    f"({' '.join(f'{weight:g}' for weight in own[1])}) have nothing to act on; "
                    "give the sets by --valid-data-path and without weights"
                )
            yield Part(split=split, prefixes=own[0], share=share)


def _shares(split: str | None, *, shared: bool) -> list[tuple[float, float] | None]:
    """Of the data sets, from and to, for each split.

    Args:
        split: of `--split`.
        shared: whether all splits read the same data sets.

    Raises:
        ConfigError: if the flag is missing, has nothing to act on, or is no list of shares.
    """
    if not shared:
        if split is not None:
            raise ConfigError(
                f"--split {split} has nothing to act on, since every split has data sets of its "
                "own; leave it out"
            )
        return [(0.0, 1.0)] * len(Split)
    try:
        # Megatron reads the digits, whatever is between them: nan,1,1 is 1,1 and 1e2 is 1 and 2.
        if split is None or not SHARES.fullmatch(split):
            raise ValueError(split)
        with numpy.errstate(invalid="raise"):
            vector = parse_and_normalize_split(split)
    except (AssertionError, FloatingPointError, TypeError, ValueError) as error:
        wrong = "--split is not given" if split is None else f"--split {split} cannot be used"
        raise ConfigError(
            f"{wrong}; give the shares of training, validation and test, such as --split 98,1,1"
        ) from error
    matrix: list[Any] = convert_split_vector_to_split_matrix(vector)
    return matrix


def _check_uses(args: Namespace, parts: list[Part]) -> None:
    """Training has data, and so has validation, which Megatron would miss after training."""
    asked = {}
    if not args.skip_train:
        asked[Split.train] = ("the run trains", "use --skip-train")
    if args.full_validation:
        asked[Split.valid] = ("--full-validation reads it", "leave that out and use --eval-iters 0")
    elif args.eval_iters:
        asked[Split.valid] = (f"--eval-iters {args.eval_iters} reads it", "use --eval-iters 0")
    names = args.validation_set_names
    for part in parts:
        if part.split is Split.valid and names and len(names) != len(part.prefixes):
            raise ConfigError(
                f"--validation-set-names {' '.join(names)} has {len(names)} names, but "
                f"--valid-data-path has {len(part.prefixes)} data sets; give a name for each"
            )
    for split, (use, remedy) in asked.items():
        if split in [part.split for part in parts]:
            continue
        given = f"--{split.name}-data-path is not given"
        share = "give it"
        if args.split is not None:
            given = f"--split {args.split} leaves nothing for {PURPOSES[split]}"
            share = "give it a share, such as --split 98,1,1"
        raise ConfigError(f"{given}, but {use}; {share}, or {remedy}")


def _check_size(args: Namespace, part: Part, prefix: str, tokens: int) -> None:
    """A split has one sequence of every data set, and the token after it."""
    if tokens > args.seq_length:
        return
    few = f"{tokens} tokens, and one sequence needs {args.seq_length + 1} (--seq-length and one)"
    if args.split is None:
        raise ConfigError(
            f"data set {prefix} of --{part.split.name}-data-path has {few}; give a larger one, or "
            "leave it out"
        )
    raise ConfigError(
        f"--split {args.split} leaves for {PURPOSES[part.split]}, of data set {prefix}, {few}; "
        "give it a larger share, or 0"
    )


def check_dataset(prefix: str, vocab_size: int) -> Index:
    """Look at one `.bin/.idx` pair.

    Args:
        prefix: path without the ending.
        vocab_size: of the tokenizer that is to read it.

    Returns:
        Its index.

    Raises:
        ConfigError: if a file is missing or truncated, or an id is outside the vocabulary.
    """
    index = open_index(prefix)
    if not index.num_tokens:
        raise ConfigError(f"data set {index.bin} is empty; give it documents")
    ids = numpy.memmap(index.bin, dtype=index.dtype, mode="r")
    ends = _ends(ids)
    smallest, largest = min(int(end.min()) for end in ends), max(int(end.max()) for end in ends)
    if smallest < 0 or largest >= vocab_size:
        raise ConfigError(
            f"data set {prefix} holds token ids {smallest} to {largest}, but the tokenizer has "
            f"{vocab_size} ids; use the tokenizer that made the data set (--tokenizer-type, "
            "--tokenizer-model)"
        )
    return index


def _warn_of_overlaps(parts: list[Part]) -> None:
    """Say that a data set is both trained on and held out."""
    for one, other in combinations(parts, 2):
        prefixes = {os.path.realpath(prefix): prefix for prefix in one.prefixes}
        for prefix in other.prefixes:
            if os.path.realpath(prefix) in prefixes:
                _warn(
                    f"data set {prefix} is in --{one.split.name}-data-path and in "
                    f"--{other.split.name}-data-path, so {PURPOSES[other.split]} reads what "
                    f"{PURPOSES[one.split]} reads; hold parts out with tools/split_dataset.py"
                )


def _warn_without_ends(args: Namespace, tokenizer: Tokenizer, indices: list[Index]) -> None:
    """Say that flags do nothing, because no document has an end."""
    flags = [dest for dest in USES_OF_ENDS if getattr(args, dest)]
    if not flags:
        return
    given = ", ".join("--" + dest.replace("_", "-") for dest in flags)
    for index in indices:
        ids = numpy.memmap(index.bin, dtype=index.dtype, mode="r")
        if not any((end == tokenizer.eod).any() for end in _ends(ids)):
            _warn(
                f"data set {index.prefix} does not hold the end-of-document id {tokenizer.eod} in "
                f"its first and last tokens, and {given} act at it alone; make it with --append-eod"
            )


def _ends(ids: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    return ids[:SAMPLED_TOKENS], ids[-SAMPLED_TOKENS:]


def _warn(message: str) -> None:
    """One line on stderr, of one rank."""
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {message}", file=sys.stderr, flush=True)
