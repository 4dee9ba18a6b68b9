"""Data sets joined to one, in the order in which they are given.

Enters: prefixes of `.bin/.idx` pairs, folders and globs of them, with or without the weights of a
blend. Leaves: one pair, the bytes that Megatron's `IndexedDatasetBuilder.add_index` would write.

Choices
- Ids are copied by the kernel (`copy_file_range`); some file systems then move no byte.
- Weights are those of a blend. What is merged is read in proportion to its tokens: other weights
  are refused, and the sum of weights in that proportion is the weight of the result.
- Ids are not widened: sets of different types were made by different tokenizers.
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
NOT_BY_THE_FILE_SYSTEM = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF)
"""What `copy_file_range` says, if it does not say 0, where a file system cannot copy by itself."""
WEIGHT_TOLERANCE = 0.01
"""Weights of a blend are written with few digits."""


def open_blend(inputs: Sequence[str]) -> list[tuple[list[Index], float | None]]:
    """What each value of `--input` names, and the weight that stands before it.

    Raises:
        ConfigError: a data set cannot be merged, or some have weights and others not.
    """
    weights, names = _weights_and_names(inputs)
    groups = open_datasets(names)
    check_same_type([index for group in groups for index in group])
    return list(zip(groups, weights, strict=True))


def _weights_and_names(inputs: Sequence[str]) -> tuple[list[float | None], list[str]]:
    """What stands before each name, as in `--data-path`."""
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
    """The weight of the merged set in a blend; None where no weights were given.

    Raises:
        ConfigError: the weights are not in proportion to the tokens.
    """
    weights = [weight for _, weight in blend if weight is not None]
    if not weights:
        return None
    tokens = [sum(index.num_tokens for index in group) for group, _ in blend]
    total, all_tokens = sum(weights), sum(tokens)
    for (group, _), weight, own in zip(blend, weights, tokens, strict=True):
        share = own * total
        if not abs(weight * all_tokens - share) <= WEIGHT_TOLERANCE * share:
            raise ConfigError(
                f"the weight {weight:g} of {group[0].prefix} is {weight / total:.1%} of all, but "
                f"its tokens are {own / max(all_tokens, 1):.1%}, and a merged set is read in "
                "proportion to its tokens; leave these sets as they are, each with its weight"
            )
    return total


def merge(
    indices: Sequence[Index],
    prefix: str,
    *,
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda num_bytes: None,
) -> Index:
    """Join data sets, in order.

    Args:
        indices: of the sets, checked.
        prefix: of the result.
        overwrite: replace it if it is there.
        progress: told the number of bytes of each piece that is copied.

    Raises:
        ConfigError: the result would be empty, is one of the sets, or cannot be written.
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
    """Copy the ids; where a file has holes, the copy has them, too."""
    start = target.tell()
    with open(index.bin, "rb", buffering=0) as source:
        for first, last in _written(source, index.num_bytes):
            source.seek(first)
            target.seek(start + first)
            _copy_bytes(source, target, last - first, progress)
        if os.fstat(source.fileno()).st_size != index.num_bytes:
            raise _changed(source)
    target.seek(start + index.num_bytes)
    target.truncate()


def _written(file: FileIO, num_bytes: int) -> Iterator[tuple[int, int]]:
    """Ranges of a file that are on the disk; all of it, where the file system has no holes."""
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


def _copy_bytes(source: FileIO, target: FileIO, left: int, progress: Callable[[int], None]) -> None:
    copy: Callable[[int, int, int], int] = os.copy_file_range
    while left:
        try:
            done = copy(source.fileno(), target.fileno(), min(left, COPY_BYTES))
        except OSError as error:
            if copy is _send or error.errno not in NOT_BY_THE_FILE_SYSTEM:
                raise
            done = 0
        if done:
            left -= done
            progress(done)
        elif copy is _send:
            raise _changed(source)
        else:
            copy = _send


def _send(source: int, target: int, count: int) -> int:
    return os.sendfile(target, source, None, count)


def _changed(file: FileIO) -> ConfigError:
    return ConfigError(
        f"{file.name!s} changed while it was read; merge it when nothing writes to it"
    )
