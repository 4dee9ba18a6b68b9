"""Finds the data sets that `--input` names.

Inputs: prefixes of `.bin/.idx` pairs, folders and globs of them.
Outputs: their indices in order, with every entry checked.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from glob import escape, glob, has_magic

from megatron_sffn.data.indexed.format import Index, check_index, open_index
from megatron_sffn.utils.errors import ConfigError


def open_datasets(inputs: Sequence[str]) -> list[list[Index]]:
    """Open the data sets that each value names.

    Raises:
        ConfigError: a file is missing or damaged, or a data set is named twice.
    """
    groups = [[open_index(prefix) for prefix in find_datasets(value)] for value in inputs]
    indices = [index for group in groups for index in group]
    real_paths: set[str] = set()
    for index in indices:
        real = os.path.realpath(index.bin)
        if real in real_paths:
            raise ConfigError(
                f"--input names {index.prefix} twice; name each data set once, and give what is "
                "to be read more often a larger weight in --data-path"
            )
        real_paths.add(real)
    for index in indices:
        check_index(index)
    return groups


def find_datasets(value: str) -> list[str]:
    """The prefixes that one value of `--input` names, sorted for a folder or a glob.

    Raises:
        ConfigError: no data set was found.
    """
    if os.path.isdir(value):
        paths = glob(os.path.join(escape(value), "*.bin")) + glob(
            os.path.join(escape(value), "*.idx")
        )
    elif has_magic(value) and not os.path.exists(value + ".idx"):
        paths = glob(value + ".bin") + glob(value + ".idx")
    else:
        paths = [value + ".idx"]
    prefixes = sorted({path[: -len(".bin")] for path in paths})
    if not prefixes:
        raise ConfigError(
            f"--input {value} leads to no data set; give a folder with .bin and .idx files, or "
            "their path without the ending, which may be a glob"
        )
    return prefixes


def check_same_type(indices: Sequence[Index]) -> None:
    """Refuse data sets that cannot be in one file.

    Raises:
        ConfigError: the types of their ids differ.
    """
    for index in indices:
        if index.dtype != indices[0].dtype:
            raise ConfigError(
                f"{indices[0].bin} holds {indices[0].dtype} ids and {index.bin} {index.dtype}, so "
                "different tokenizers made them; give sets of one tokenizer"
            )
