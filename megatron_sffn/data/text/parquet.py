"""Parquet files, with a document in each row.

Outputs: batches of rows of about `BATCH_BYTES`, whatever the size of the row groups.

Design notes:
- pyarrow is slow to import, so this module is imported only when `--input` names a Parquet file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow
from pyarrow.parquet import ParquetFile

from megatron_sffn.utils.errors import ConfigError

BATCH_BYTES = 1 << 20
BUFFER_BYTES = 1 << 20


def check_columns(path: str, columns: Sequence[str]) -> None:
    """Refuse a file that is not Parquet or lacks a column."""
    try:
        with ParquetFile(path) as file:
            names = file.schema_arrow.names
    except (OSError, pyarrow.ArrowException) as error:
        raise ConfigError(
            f"--input {path} is no Parquet file, or a truncated one ({_first_line(error)}); "
            "make or copy it again"
        ) from error
    for column in columns:
        if column not in names:
            raise ConfigError(
                f"{path} has no column {column!r} (it has {', '.join(names)}); "
                "name an existing column"
            )


def read_rows(
    path: str, columns: Sequence[str] | None, start: int
) -> Iterator[tuple[Any, int, float]]:
    """Read batches of rows.

    Args:
        path: path of the file.
        columns: columns to read; None: all of them.
        start: rows to skip.

    Yields:
        A `pyarrow.RecordBatch`, the number of rows before it, and the share of the file that has
        been read after it.

    Raises:
        OSError: the file cannot be read to its end.
    """
    try:
        # Without these two options a complete row group would be in memory.
        with ParquetFile(path, buffer_size=BUFFER_BYTES, pre_buffer=False) as file:
            yield from _batches(file, columns, start)
    except pyarrow.ArrowException as error:
        raise OSError(_first_line(error)) from error


def _batches(
    file: ParquetFile, columns: Sequence[str] | None, start: int
) -> Iterator[tuple[Any, int, float]]:
    groups = [file.metadata.row_group(index) for index in range(file.num_row_groups)]
    num_rows = file.metadata.num_rows
    num_bytes = sum(group.total_byte_size for group in groups)
    batch_size = max(1, BATCH_BYTES * num_rows // max(num_bytes, 1))
    row = 0
    for index, group in enumerate(groups):
        if row + group.num_rows <= start:
            row += group.num_rows
            continue
        # The workers are forked, and pyarrow's threads would not survive the fork.
        for batch in file.iter_batches(batch_size, [index], columns, use_threads=False):
            first, row = row, row + batch.num_rows
            if row > start:
                first = max(first, start)
                yield batch.slice(batch.num_rows - (row - first)), first, row / num_rows


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
