"""Checkpoints are data: reading one runs no code that it names, where torch would run it.

Enters: torch's reader of distributed checkpoints. Leaves: two of its names replaced, on every
machine.

torch.load takes tensors and plain values alone unless it is told otherwise, and Megatron adds the
classes that its checkpoints need. Two places tell it otherwise, or go round it:

- The objects among the shards are loaded with `weights_only=False`.
- `.metadata` is a bare pickle.

Choice: torch's own environment variable takes the limits back, here as in `torch.load`.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import IO, Any

import torch
from torch.distributed.checkpoint._traverse import set_element

from megatron_sffn.patches.registry import Adaptation, apply_once

TRUST = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
"""torch's environment variable: files may name any code."""

METADATA_NAMES = {
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},  # of Python 3.13
    "torch": {"Size"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
    "torch.serialization": {"_get_layout"},
}
"""Module -> what `.metadata` may name of it, beside torch's dtypes."""


class ForeignCode(pickle.UnpicklingError):
    """A pickle names what is no data; the message is the name."""


def install() -> None:
    """Replace the names; called again, do nothing.

    Raises:
        ConfigError: if one no longer exists.
    """
    apply_once(adaptations())


def adaptations() -> tuple[Adaptation, ...]:
    """Every name that is replaced, with the code that uses it."""
    return (
        Adaptation(
            target="torch.distributed.checkpoint.filesystem.pickle",
            make=_with_names_of_metadata_only,
            needed_by="torch.distributed.checkpoint.filesystem.FileSystemReader.read_metadata",
        ),
        Adaptation(
            target="torch.distributed.checkpoint.default_planner.DefaultLoadPlanner.load_bytes",
            make=_as_weights_only,
            needed_by="torch.distributed.checkpoint.filesystem.FileSystemReader.read_data",
        ),
    )


def trust() -> None:
    """Take the limits back, in this process and those that it starts."""
    os.environ[TRUST] = "1"


def trusted() -> bool:
    """Whether they are, as torch reads its variable."""
    return os.environ.get(TRUST, "0").lower() in ("1", "y", "yes", "true")


class _MetadataUnpickler(pickle.Unpickler):
    """Knows the names of `METADATA_NAMES` and torch's dtypes."""

    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(vars(torch).get(name), torch.dtype)
        if not dtype and name not in METADATA_NAMES.get(module, ()) and not trusted():
            raise ForeignCode(f"{module}.{name}")
        return super().find_class(module, name)


def _with_names_of_metadata_only(original: Any) -> Any:
    """Python's `pickle`, for a module that reads `.metadata` with it."""

    def load(file: IO[bytes]) -> Any:
        return _MetadataUnpickler(file).load()

    return SimpleNamespace(**{**vars(original), "load": load})


def _as_weights_only(original: Callable[..., None]) -> Callable[..., None]:
    """torch's method, but for what `torch.load` is told."""

    def load_bytes(self: Any, read_item: Any, value: IO[bytes]) -> None:
        key = read_item.dest_index.fqn
        loaded = torch.load(value, weights_only=not trusted())
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[key], loaded)
        else:
            self.state_dict[key] = loaded

    return load_bytes
