"""Appends rows of results to a CSV file; each benchmark has a dataclass of rows.

Design notes: a row is complete in itself, with device and versions. A column is a field of the
dataclass, without the trailing underscore of a name that Python reserves.
"""

from __future__ import annotations

import csv
import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_sffn.utils.errors import ConfigError


def columns(row_type: type) -> list[str]:
    """The column names of a dataclass of rows."""
    return [field.name.rstrip("_") for field in dataclasses.fields(row_type)]


def append(rows: Sequence[Any], path: Path) -> None:
    """Append rows of one dataclass to a CSV file; a new file gets a header first."""
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if not file.tell():
            writer.writerow(columns(type(rows[0])))
        writer.writerows(dataclasses.astuple(row) for row in rows)


def read[T](path: Path, row_type: type[T]) -> list[T]:
    """The rows of one dataclass from a CSV file that `append` has written."""
    types: dict[str, Callable[[str], Any]] = {
        "int": int,
        "float": float,
        "bool": lambda text: text == "True",
        "str": str,
    }
    fields = dataclasses.fields(row_type)  # type: ignore[arg-type]  # a dataclass
    with path.open(newline="", encoding="utf-8") as file:
        return [
            row_type(**{f.name: types[str(f.type)](line[f.name.rstrip("_")]) for f in fields})
            for line in csv.DictReader(file)
        ]


def check_plot(path: Path) -> None:
    """Check that a plot can be written.

    Raises:
        ConfigError: if the name does not end in .png, or its folder does not exist.
    """
    if path.suffix != ".png":
        raise ConfigError(f"--plot {path} does not end in .png; give a name that does")
    if not path.parent.is_dir():
        raise ConfigError(f"--plot {path} is in no folder; make {path.parent} first")


def check_output(path: Path, row_type: type) -> None:
    """Check that rows can be appended to a file.

    Raises:
        ConfigError: if the path is a folder, cannot be written, or has other columns.
    """
    if path.is_dir():
        raise ConfigError(f"--output {path} is a folder; give the path of a file in it")
    if not path.parent.is_dir():
        raise ConfigError(f"--output {path} is in no folder; make {path.parent} first")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"--output {path} cannot be written; give another path")
    if path.exists() and path.stat().st_size:
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            if next(csv.reader(file), []) != columns(row_type):
                raise ConfigError(f"--output {path} has other columns; give another path")
