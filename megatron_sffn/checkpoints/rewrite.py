"""Writes an atomic copy of a checkpoint in which some tensors are changed.

Inputs: the folder of an iteration, and the changes of its tensors. Outputs: a folder of the same
format, with the same keys, that any layout of ranks can load.

Design notes:
- One process without a process group does the work, one piece at a time: a tensor that changes is
  read and written in the pieces in which the ranks saved it, and everything else is copied byte by
  byte. RAM has to hold the largest piece.
- Shard files keep their names and have the same pieces in the same order; only the offsets in
  `.metadata` are new. So the copy has no bytes that are no longer used.
- The copy is an atomic write: files are written into a sibling folder, synced and checked; then the
  folder is renamed, and Megatron's tracker file follows. A kill leaves a `.partial` folder, which
  the next run removes.
"""

from __future__ import annotations

import dataclasses
import io
import os
import pickle
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from megatron.core.dist_checkpointing.core import CONFIG_FNAME
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.validation import INTEGRITY_FNAME, save_integrity_manifest
from torch import Tensor
from torch.distributed.checkpoint import Metadata
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from megatron_sffn.checkpoints.files import (
    COMMON_STATE,
    METADATA,
    TRACKER,
    iteration_folder,
    problem_of,
    read_metadata,
)
from megatron_sffn.utils.atomic_files import atomic_write, sync
from megatron_sffn.utils.errors import ConfigError

COPIED = 1 << 24
"""Bytes that are copied at a time."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """The change of a tensor.

    Args:
        piece: maps consecutive rows before to the same rows after, of the same dtype.
        rows: number of rows before and after; every piece has the same quotient of the two.
    """

    piece: Callable[[Tensor], Tensor]
    rows: tuple[int, int]

    def row(self, before: int) -> int:
        """The new number of a row that starts a piece."""
        old, new = self.rows
        assert before * new % old == 0, (before, self.rows)
        return before * new // old


def rewrite(
    source: Path,
    save: Path,
    iteration: int,
    *,
    changes: Mapping[str, Change],
    common: dict[str, Any],
    progress: Callable[[int], object] = lambda size: None,
) -> Path:
    """Write a changed copy of an iteration.

    Args:
        source: the iteration's folder.
        save: folder for the copy, which gets Megatron's name for it, and for the tracker file.
        iteration: the iteration's number.
        changes: key of a tensor -> its change.
        common: the new common state.
        progress: called with the number of bytes of the source that are done.

    Returns:
        The folder of the copy.

    Raises:
        ConfigError: if it exists or cannot be written; nothing of it is then left.
    """
    target = free_folder(save, iteration)
    metadata = read_metadata(source)
    if (source / COMMON_STATE_FNAME).exists() or COMMON_STATE not in metadata.state_dict_metadata:
        raise ConfigError(
            f"checkpoint {source} has its common state in {COMMON_STATE_FNAME} beside the shards, "
            "as before Megatron 0.19; load it and save it again first"
        )
    with _new_folder(
        target, sum(item.length for item in metadata.storage_data.values())
    ) as partial_folder:
        new_metadata = _write_shards(source, partial_folder, metadata, changes, common, progress)
        with _created(partial_folder / METADATA) as file:
            pickle.dump(new_metadata, file)
        _copy_others(source, partial_folder, metadata)
        assert new_metadata.state_dict_metadata.keys() == metadata.state_dict_metadata.keys(), (
            target
        )
        problem = problem_of(partial_folder)
        assert problem is None, (target, problem)
    point_to(save, iteration)
    return target


def free_folder(save: Path, iteration: int) -> Path:
    """Megatron's folder for an iteration, which must not exist.

    Raises:
        ConfigError: if it exists.
    """
    target = iteration_folder(save, iteration)
    if target.exists():
        raise ConfigError(f"{target} exists; give another --save, or remove it")
    return target


@contextmanager
def _new_folder(target: Path, size: int) -> Iterator[Path]:
    """A folder that is renamed to `target` when the block ends, or removed if the block fails."""
    save = target.parent
    new_parents = [path for path in (save, *save.parents) if not path.exists()]
    partial_folder = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        save.mkdir(parents=True, exist_ok=True)
        for stale in save.glob(f".{target.name}.*.partial"):
            shutil.rmtree(stale)
        free = shutil.disk_usage(save).free
        if free < size:
            raise ConfigError(
                f"--save {save} has {free / 1e9:.1f} GB free, but the checkpoint has "
                f"{size / 1e9:.1f} GB; give a folder with more room"
            )
        partial_folder.mkdir()
        yield partial_folder
        sync(partial_folder)
        partial_folder.rename(target)
        sync(save)
    except OSError as error:
        raise ConfigError(f"{target} cannot be written ({error}); give another --save") from error
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)
        for path in new_parents:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


@contextmanager
def _created(path: Path) -> Iterator[IO[bytes]]:
    """A new file, on the disk when the block ends."""
    with path.open("xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _write_shards(
    source: Path,
    folder: Path,
    metadata: Metadata,
    changes: Mapping[str, Change],
    common: dict[str, Any],
    progress: Callable[[int], object],
) -> Metadata:
    """Write all shard files; returns the metadata with the places of their pieces."""
    files: dict[str, list[tuple[MetadataIndex, Any]]] = {}
    for index, item in metadata.storage_data.items():
        files.setdefault(item.relative_path, []).append((index, item))
    storage = {}
    for name, pieces in sorted(files.items()):
        with (source / name).open("rb") as old_file, _created(folder / name) as new_file:
            for index, item in sorted(pieces, key=lambda piece: piece[1].offset):
                start, change = new_file.tell(), changes.get(index.fqn)
                old_file.seek(item.offset)
                if index.fqn == COMMON_STATE:
                    # Megatron wraps an object in a list.
                    new_file.write(_bytes_of([common]))
                elif change is None:
                    _copy(old_file, new_file, item.length)
                else:
                    new_file.write(_changed(old_file.read(item.length), change))
                    index = _moved(index, change)
                storage[index] = dataclasses.replace(
                    item, offset=start, length=new_file.tell() - start
                )
                progress(item.length)
    entries = {
        key: _resized(entry, changes[key])
        if key in changes and isinstance(entry, TensorStorageMetadata)
        else entry
        for key, entry in metadata.state_dict_metadata.items()
    }
    # A new object, because Megatron adds the plans of all ranks to the original.
    return dataclasses.replace(metadata, state_dict_metadata=entries, storage_data=storage)


def _bytes_of(value: Any) -> bytes:
    """A value as torch's checkpoints store it."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _changed(data: bytes, change: Change) -> bytes:
    """Load a piece of a tensor, change it, and serialise it again."""
    before = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    after = change.piece(before)
    assert after.dtype == before.dtype, (before.dtype, after.dtype)
    # Clone, because torch saves a view with its whole storage.
    return _bytes_of(after.clone())


def _copy(old: IO[bytes], new: IO[bytes], length: int) -> None:
    """Copy the next bytes unchanged."""
    while length:
        data = old.read(min(length, COPIED))
        assert data, (old.name, length)  # `read_whole` has looked at the sizes
        new.write(data)
        length -= len(data)


def _moved(index: MetadataIndex, change: Change) -> MetadataIndex:
    """The index of a piece in the changed tensor."""
    assert index.offset is not None, index
    first, *rest = index.offset
    return MetadataIndex(index.fqn, (change.row(first), *rest), index.index)


def _resized(entry: TensorStorageMetadata, change: Change) -> TensorStorageMetadata:
    """The metadata of the changed tensor."""
    chunks = [
        ChunkStorageMetadata(
            offsets=torch.Size((change.row(chunk.offsets[0]), *chunk.offsets[1:])),
            sizes=torch.Size((change.row(chunk.sizes[0]), *chunk.sizes[1:])),
        )
        for chunk in entry.chunks
    ]
    size = torch.Size((change.rows[1], *entry.size[1:]))
    return dataclasses.replace(entry, size=size, chunks=chunks)


def _copy_others(source: Path, folder: Path, metadata: Metadata) -> None:
    """Copy the files beside the shards, Megatron's own file last, and write its manifest again."""
    written_names = {item.relative_path for item in metadata.storage_data.values()}
    written_names |= {METADATA, CONFIG_FNAME, INTEGRITY_FNAME}
    for path in sorted(source.iterdir()):
        if path.is_dir():
            shutil.copytree(path, folder / path.name)
        elif path.name not in written_names:
            with path.open("rb") as old_file, _created(folder / path.name) as new_file:
                shutil.copyfileobj(old_file, new_file, COPIED)
    with _created(folder / CONFIG_FNAME) as new_file:
        new_file.write((source / CONFIG_FNAME).read_bytes())
    if (source / INTEGRITY_FNAME).is_file():
        save_integrity_manifest(str(folder))


def point_to(save: Path, iteration: int) -> None:
    """Make an iteration the one that Megatron loads."""
    with atomic_write(save / TRACKER, durable=True) as file:
        file.write(str(iteration))
