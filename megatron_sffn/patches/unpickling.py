"""Names of torch's checkpoint reader, so that reading a checkpoint runs no code that it names.

torch.load reads tensors and plain values alone unless it is told otherwise, and Megatron adds the
classes that its checkpoints need. Two places in torch have no such limit:

- The objects among the shards are loaded with `weights_only=False`.
- `.metadata` is a bare pickle.

Design notes: torch's own environment variable lifts the limits, as it does for `torch.load`.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import IO, Any, override

import torch
from torch.distributed.checkpoint._traverse import set_element

from megatron_sffn.patches.registry import Patch, apply

TRUST = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
"""torch's environment variable that lets files name any code."""

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
"""Module -> names in it that `.metadata` may use, beside torch's dtypes."""


class ForeignCode(pickle.UnpicklingError):
    """A pickle names something that is not data; the message is the name."""


def install() -> None:
    """Replace the names; idempotent.

    Raises:
        ConfigError: if a name does not exist.
    """
    for patch in PATCHES:
        apply(patch)


def trust() -> None:
    """Lift the limits, in this process and in those that it starts."""
    os.environ[TRUST] = "1"


def trusted() -> bool:
    """True if the limits are lifted; the variable is read as torch reads it."""
    return os.environ.get(TRUST, "0").lower() in ("1", "y", "yes", "true")


class _MetadataUnpickler(pickle.Unpickler):
    """An unpickler for the names of `METADATA_NAMES` and torch's dtypes alone."""

    @override
    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(vars(torch).get(name), torch.dtype)
        if not dtype and name not in METADATA_NAMES.get(module, ()) and not trusted():
            raise ForeignCode(f"{module}.{name}")
        return super().find_class(module, name)


def _with_names_of_metadata_only(original: Any) -> Any:
    """Python's `pickle`, with a `load` that is limited to the names in `.metadata`."""

    def load(file: IO[bytes]) -> Any:
        return _MetadataUnpickler(file).load()

    return SimpleNamespace(**{**vars(original), "load": load})


def _as_weights_only(original: Callable[..., None]) -> Callable[..., None]:
    """torch's method, with `weights_only=True`."""

    def load_bytes(self: Any, read_item: Any, value: IO[bytes]) -> None:
        key = read_item.dest_index.fqn
        loaded = torch.load(value, weights_only=not trusted())
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[key], loaded)
        else:
            self.state_dict[key] = loaded

    return load_bytes


PATCHES = (
    Patch(
        target="torch.distributed.checkpoint.filesystem.pickle",
        make=_with_names_of_metadata_only,
        needed_by="torch.distributed.checkpoint.filesystem.FileSystemReader.read_metadata",
        why=".metadata is a bare pickle: reading it runs any code that it names",
        until="torch limits .metadata to its own classes",
    ),
    Patch(
        target="torch.distributed.checkpoint.default_planner.DefaultLoadPlanner.load_bytes",
        make=_as_weights_only,
        needed_by="torch.distributed.checkpoint.filesystem.FileSystemReader.read_data",
        why="objects are loaded with weights_only=False: reading one runs any code that it names",
        until="torch loads them with weights_only=True",
    ),
)
