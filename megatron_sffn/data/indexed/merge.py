"""Merges data sets into one, in the given order.

Inputs: prefixes of `.bin/.idx` pairs, folders and globs of them, with or without the weights of a
blend. Outputs: one pair, byte for byte that of Megatron's `IndexedDatasetBuilder.add_index`.

Design notes:
- The kernel copies the ids (`copy_file_range`); some file systems then share the data instead.
- Documents of a merged set are read in proportion to their tokens. So the weights of a blend must
  be in this proportion, and their sum is the weight of the merged set in the blend.
- Ids are not converted: data sets with different types of ids come from different tokenizers.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from io import FileIO

from megatron_sffn.data.indexed.blends import check_weights
from megatron_sffn.data.indexed.find import check_same_type, open_datasets
from megatron_sffn.data.indexed.format import Index, IndexWriter, open_index, pieces
from megatron_sffn.data.output.atomic_output import atomic_output, bin_and_idx
from megatron_sffn.utils.errors import ConfigError

COPY_BYTES = 64 << 20
COPY_UNSUPPORTED = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF)
"""Errors of `copy_file_range` where the file system cannot copy; some return 0 instead."""
WEIGHT_TOLERANCE = 0.01
"""Relative tolerance: weights of a blend are written with few digits."""


def open_blend(inputs: Sequence[str]) -> list[tuple[list[Index], float | None]]:
    """Open the data sets of each value of `--input`, with the weight before it.

    Raises:
        ConfigError: a data set cannot be merged, or only some have weights.
    """
    weights, names = _weights_and_names(inputs)
    groups = open_datasets(names)
    check_same_type([index for group in groups for index in group])
    return list(zip(groups, weights, strict=True))


def _weights_and_names(inputs: Sequence[str]) -> tuple[list[float | None], list[str]]:
    """Separate weights and names, which alternate as in `--data-path`."""
    numbers = [_number(value) for value in inputs]
    if all(number is None for number in numbers):
        return [None] * len(inputs), list(inputs)
    expected = [None if at % 2 else number for at, number in enumerate(numbers)]
    if len(inputs) % 2 or numbers != expected or None in numbers[::2]:
        raise ConfigError(
            f"--input {' '.join(inputs)} has weights for some data sets only; give one before "
            "each, or none"
        )
    weights = [number or 0.0 for number in numbers[::2]]
    check_weights("--input", weights)
    return list(weights), list(inputs[1::2])


def _number(value: str) -> float | None:
    try:
        return float(value)
    except ValueError:
        return None


def merged_weight(blend: Sequence[tuple[Sequence[Index], float | None]]) -> float | None:
    """The weight of the merged set in a blend; None if no weights were given.

    Raises:
        ConfigError: the weights are not in proportion to the tokens.
    """
    weights = [weight for _, weight in blend if weight is not None]
    if not weights:
        return None
    tokens = [sum(index.num_tokens for index in group) for group, _ in blend]
    total, all_tokens = sum(weights), sum(tokens)
    for (group, _), weight, group_tokens in zip(blend, weights, tokens, strict=True):
        share = group_tokens * total
        if not abs(weight * all_tokens - share) <= WEIGHT_TOLERANCE * share:
            raise ConfigError(
                f"the weight {weight:g} of {group[0].prefix} is {weight / total:.1%} of all, but "
                f"its tokens are {group_tokens / max(all_tokens, 1):.1%}, and a merged set is read "
                "in proportion to its tokens; leave these sets as they are, each with its weight"
            )
    return total


def merge(
    indices: Sequence[Index],
    prefix: str,
    *,
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda num_bytes: None,
) -> Index:
    """Merge data sets, in order.

    Args:
        indices: indices of the data sets, checked.
        prefix: prefix of the merged set.
        overwrite: replace an existing one.
        progress: receives the number of bytes of each copied piece.

    Raises:
        ConfigError: the merged set would be empty, is one of the inputs, or cannot be written.
    """
    if not any(index.num_tokens for index in indices):
        raise ConfigError(
            f"--input names {len(indices)} data sets without tokens; give one with documents"
        )
    paths = bin_and_idx(prefix)
    for index in indices:
        if os.path.realpath(index.bin) == os.path.realpath(paths[0]):
            raise ConfigError(
                f"--output-prefix {prefix} is one of the data sets to merge; give another"
            )
    with (
        atomic_output(prefix, paths, overwrite=overwrite) as folder,
        closing(IndexWriter(indices[0].dtype, folder)) as writer,
        (folder / paths[0].name).open("wb", buffering=0) as target,
    ):
        for index in indices:
            _copy(index, target, progress)
            _append(index, writer)
        writer.finish(folder / paths[1].name)
    return open_index(prefix)


def _append(index: Index, writer: IndexWriter) -> None:
    first, lengths, ends = writer.num_sequences, index.lengths, index.documents[1:]
    for piece in pieces(len(lengths)):
        writer.add_sequences(lengths[piece])
    for piece in pieces(len(ends)):
        writer.end_documents(first + ends[piece])


def _copy(index: Index, target: FileIO, progress: Callable[[int], None]) -> None:
    """Copy the ids; holes of a sparse file stay holes."""
    start = target.tell()
    with open(index.bin, "rb", buffering=0) as source:
        for first, last in _data_ranges(source, index.num_bytes):
            source.seek(first)
            target.seek(start + first)
            _copy_bytes(source, target, last - first, progress)
        if os.fstat(source.fileno()).st_size != index.num_bytes:
            raise _changed(source)
    target.seek(start + index.num_bytes)
    target.truncate()


def _data_ranges(file: FileIO, num_bytes: int) -> Iterator[tuple[int, int]]:
    """Ranges of a file that hold data; the complete file, if the file system has no holes."""
    last = 0
    while last < num_bytes:
        try:
            first = os.lseek(file.fileno(), last, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return
        if first >= num_bytes:
            return
        last = min(os.lseek(file.fileno(), first, os.SEEK_HOLE), num_bytes)
        yield first, last


def _copy_bytes(
    source: FileIO, target: FileIO, num_bytes: int, progress: Callable[[int], None]
) -> None:
    copy: Callable[[int, int, int], int] = os.copy_file_range
    while num_bytes:
        try:
            copied = copy(source.fileno(), target.fileno(), min(num_bytes, COPY_BYTES))
        except OSError as error:
            if copy is _send or error.errno not in COPY_UNSUPPORTED:
                raise
            copied = 0
        if copied:
            num_bytes -= copied
            progress(copied)
        elif copy is _send:
            raise _changed(source)
        else:
            copy = _send  # fallback


def _send(source: int, target: int, count: int) -> int:
    return os.sendfile(target, source, None, count)


def _changed(file: FileIO) -> ConfigError:
    return ConfigError(
        f"{file.name!s} changed while it was read; merge it when nothing writes to it"
    )
