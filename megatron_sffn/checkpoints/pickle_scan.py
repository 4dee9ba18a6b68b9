"""Scan of a checkpoint's pickles for code that would run when they are loaded.

Inputs: the folder of an iteration, in any of Megatron's formats. Outputs: the files that name code,
and the names. `checks/pickles.py` refuses them.

Design notes:
- torch knows which classes are data, and Megatron adds a few. The scan lists the names in a pickle
  without unpickling anything. Loading has the same limits (`patches/unpickling.py`); the scan finds
  the code early, so that the refusal can name it.
- Of the shards only objects are read, since tensors hold no pickles.
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
from megatron_sffn.patches.unpickling import ForeignCode

TRUST_FLAG = "--sffn-trust-checkpoint"

NOT_FROM_A_CHECKPOINT = frozenset({TRUST_FLAG, "--trust-remote-code", "--spec"})
"""Flags that let foreign code run: dropped from a command line that comes from a checkpoint."""


def without(command: Sequence[str], flags: frozenset[str]) -> list[str]:
    """A command line without some flags and their values."""
    words, is_dropped = [], False
    for word in command:
        if word.startswith("--"):
            is_dropped = word.split("=", 1)[0] in flags
        if not is_dropped:
            words.append(word)
    return words


def foreign_code(folder: Path) -> Iterator[tuple[str, str]]:
    """Find names whose code would run if an iteration were loaded.

    Yields:
        File, relative to the folder, and the name in it that is not data.
    """
    for path in [folder / COMMON_STATE_FNAME, *sorted(folder.glob("mp_rank_*/*.pt"))]:
        if path.is_file():
            yield from ((str(path.relative_to(folder)), name) for name in _names_in_file(path))
    if (folder / METADATA).is_file():
        yield from _foreign_code_in_shards(folder)


def _names_in_file(path: Path) -> list[str]:
    if zipfile.is_zipfile(path):
        with path.open("rb") as file:
            return _names(file)
    return ["what torch.save before 1.6 could name"]


def _foreign_code_in_shards(folder: Path) -> Iterator[tuple[str, str]]:
    """As `foreign_code`, in the metadata of the shards and in the objects that they hold."""
    try:
        metadata = FileSystemReader(folder).read_metadata()
        objects = _objects(metadata)
    except ForeignCode as error:
        yield METADATA, str(error)
        return
    except Exception:
        return  # damaged: files.py reports it
    for name, items in objects.items():
        path = folder / name
        if not path.is_file():
            continue
        with path.open("rb") as file:
            for item in items:
                file.seek(item.offset)
                yield from ((name, code) for code in _names(io.BytesIO(file.read(item.length))))


def _objects(metadata: Any) -> dict[str, list[Any]]:
    """Shard file -> storage records of the objects in it."""
    objects: dict[str, list[Any]] = {}
    for index, item in metadata.storage_data.items():
        if isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata):
            objects.setdefault(item.relative_path, []).append(item)
    return objects


def _names(file: IO[bytes]) -> list[str]:
    """Names in a file of torch.save that are not data."""
    try:
        return sorted(get_unsafe_globals_in_checkpoint(file))
    except pickle.UnpicklingError:
        return ["what torch's checkpoints never hold"]
    except ValueError:
        # Not a zip file, or a TorchScript program.
        file.seek(0)
        return ["a TorchScript program"] if zipfile.is_zipfile(file) else []
    except Exception:
        return []  # damaged: files.py reports it
