"""Whether a checkpoint is data alone: nothing in it names code that would run as it is loaded.

Enters: the folder of an iteration, in any of Megatron's formats. Leaves: nothing, or one sentence
with the file and what it names, before any process group exists.

Choices
- torch says what is data, with the classes that Megatron adds: the names in a pickle are listed,
  and nothing is unpickled. Reading has the same limits (`patches/unpickling.py`); this look makes
  the sentence, and is early.
- Of the shards only the objects are read, as tensors hold no pickles.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from torch.serialization import get_unsafe_globals_in_checkpoint

from megatron_sffn.checkpoints.files import METADATA
from megatron_sffn.patches.unpickling import ForeignCode, trusted
from megatron_sffn.utils.errors import ConfigError

TRUST_FLAG = "--sffn-trust-checkpoint"

NOT_FROM_A_CHECKPOINT = frozenset({TRUST_FLAG, "--trust-remote-code", "--spec"})
"""Flags that let others' code run: a command line that a checkpoint holds cannot give them."""


def check_data_only(folder: Path) -> None:
    """Look at all that would be unpickled of an iteration.

    Raises:
        ConfigError: if something would run code, and `patches.unpickling.trust` was not called.
    """
    if trusted():
        return
    for place, name in _named(folder):
        raise ConfigError(
            f"checkpoint {folder} names {name} in {place}, which is code that would run as it is "
            f"loaded; load another one, or add {TRUST_FLAG} if you trust who made it"
        )


def without(command: Sequence[str], flags: frozenset[str]) -> list[str]:
    """A command line without some flags and their values."""
    left, dropped = [], False
    for word in command:
        if word.startswith("--"):
            dropped = word.split("=", 1)[0] in flags
        if not dropped:
            left.append(word)
    return left


def _named(folder: Path) -> Iterator[tuple[str, str]]:
    """Files, and what they name that is no data."""
    for path in [folder / COMMON_STATE_FNAME, *sorted(folder.glob("mp_rank_*/*.pt"))]:
        if path.is_file():
            yield from ((str(path.relative_to(folder)), name) for name in _names_in_file(path))
    if (folder / METADATA).is_file():
        yield from _named_in_shards(folder)


def _names_in_file(path: Path) -> list[str]:
    if zipfile.is_zipfile(path):
        with path.open("rb") as file:
            return _names(file)
    return ["what torch.save before 1.6 could name"]


def _named_in_shards(folder: Path) -> Iterator[tuple[str, str]]:
    """The same of the shards' metadata, and of the objects among them."""
    try:
        metadata = FileSystemReader(folder).read_metadata()
        objects = _objects(metadata)
    except ForeignCode as error:
        yield METADATA, str(error)
        return
    except Exception:
        return  # damaged, which is the matter of files.py
    for name, items in objects.items():
        path = folder / name
        if not path.is_file():
            continue
        with path.open("rb") as file:
            for item in items:
                file.seek(item.offset)
                yield from ((name, code) for code in _names(io.BytesIO(file.read(item.length))))


def _objects(metadata: Any) -> dict[str, list[Any]]:
    """Shard file -> where objects are in it."""
    objects: dict[str, list[Any]] = {}
    for index, item in metadata.storage_data.items():
        if isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata):
            objects.setdefault(item.relative_path, []).append(item)
    return objects


def _names(file: IO[bytes]) -> list[str]:
    """What a file of torch.save names that is no data."""
    try:
        return sorted(get_unsafe_globals_in_checkpoint(file))
    except pickle.UnpicklingError:
        return ["what torch's checkpoints never hold"]
    except ValueError:
        # No zip file, or a program.
        file.seek(0)
        return ["a TorchScript program"] if zipfile.is_zipfile(file) else []
    except Exception:
        return []  # damaged, which is the matter of files.py
