"""Megatron's checkpoints on disk: which iteration a run loads, and whether it is damaged.

Inputs: the folder of `--load`. Outputs: the folder of one iteration in the `torch_dist` format, the
metadata of its shards, and the common state, in which Megatron keeps the arguments of the run. One
sentence says what is damaged in a checkpoint.

Design notes: tensors are not read; only the sizes of the shard files are checked, so that the check
takes milliseconds for a checkpoint of any size. The common state is the only object that is read;
Megatron 0.19 keeps it in a shard.
"""

from __future__ import annotations

import re
import warnings
from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.core import CONFIG_FNAME, maybe_load_config
from megatron.core.dist_checkpointing.serialization import load_common_state_dict
from torch.distributed.checkpoint import FileSystemReader, Metadata
from torch.distributed.checkpoint.api import CheckpointException

from megatron_sffn.utils.errors import ConfigError

TRACKER = "latest_checkpointed_iteration.txt"
"""Megatron's file that names the iteration to load."""

METADATA = ".metadata"
"""torch's file with the place of every piece of every tensor in the shard files."""

COMMON_STATE = "common_state/shard_0_1"
"""The object that holds everything but tensors."""

SHOWN = 8
"""Iterations that a message lists."""


class Damaged(Exception):
    """A checkpoint is incomplete; the message names the file, as part of a sentence."""


def iteration_folder(load: Path, iteration: int) -> Path:
    """The folder in which Megatron keeps an iteration."""
    return load / f"iter_{iteration:07d}"


def iteration_of(folder: Path) -> int:
    """The number in Megatron's name for the folder of an iteration."""
    return int(folder.name.removeprefix("iter_"))


def iterations(load: Path) -> list[int]:
    """The iterations that have a folder in `load`, complete or not, ascending."""
    if not load.is_dir():
        return []
    names = (re.fullmatch(r"iter_(\d{7,})", path.name) for path in load.iterdir() if path.is_dir())
    return sorted(int(name[1]) for name in names if name)


def folder_to_load(load: Path, step: int | None) -> Path | None:
    """The folder of the iteration that Megatron will load.

    Args:
        load: value of `--load`.
        step: value of `--ckpt-step`.

    Returns:
        None if there is no tracker file: then Megatron starts from scratch.

    Raises:
        ConfigError: if the iteration does not exist, or the tracker file names none.
    """
    tracked = _tracked(load)
    if step is not None:
        return _folder_of_step(load, step, tracked)
    if tracked is None:
        return None
    name = tracked if tracked == "release" else iteration_folder(load, int(tracked)).name
    if not (load / name).is_dir():
        raise ConfigError(
            f"{load / TRACKER} names {name}, which is not there ({_iterations_in(load)}); "
            f"{_remedy(load)}"
        )
    return load / name


def _tracked(load: Path) -> str | None:
    """The content of the tracker file, a number or `release`; None if there is no such file."""
    tracker = load / TRACKER
    if not tracker.is_file():
        return None
    text = tracker.read_bytes().decode(errors="replace").strip()
    if text != "release" and not re.fullmatch(r"\d+", text, re.ASCII):
        raise ConfigError(
            f"{tracker} says {text[:40]!r}, which is not the number of an iteration "
            f"({_iterations_in(load)}); write the one to load into it"
        )
    return text


def _folder_of_step(load: Path, step: int, tracked: str | None) -> Path:
    """The folder of `--ckpt-step`."""
    if tracked == "release":
        raise ConfigError(
            f"--ckpt-step {step} would be ignored, since {load / TRACKER} says release; write "
            f"{step} into it instead"
        )
    folder = iteration_folder(load, max(step, 0))
    # Megatron treats --ckpt-step 0 as if it were not given.
    if step < 1 or not folder.is_dir():
        remedy = "use one of these" if iterations(load) else "check --load"
        raise ConfigError(f"--ckpt-step {step} is not there ({_iterations_in(load)}); {remedy}")
    return folder


def _iterations_in(load: Path) -> str:
    """The iterations in a folder, as part of a sentence."""
    saved = iterations(load)
    prefix = "the last ones are " if len(saved) > SHOWN else ""
    shown = ", ".join(map(str, saved[-SHOWN:])) or "none"
    return f"iterations in {load}: {prefix}{shown}"


def last_whole(load: Path, but: Path | None = None) -> int | None:
    """The last complete iteration outside the folder `but`; None if there is none."""
    for iteration in reversed(iterations(load)):
        folder = iteration_folder(load, iteration)
        if folder != but and problem_of(folder) is None:
            return iteration
    return None


def _remedy(load: Path, but: Path | None = None) -> str:
    """The iteration to load instead, as part of a sentence."""
    iteration = last_whole(load, but)
    if iteration is not None:
        return f"use --ckpt-step {iteration}, the last one that is whole"
    subject = "no other iteration" if but is not None else "none"
    return f"{subject} there is whole: use another --load"


def is_torch_dist(folder: Path, *, detect: bool = False) -> bool:
    """True if an iteration is in the format that this module reads, even if incomplete.

    Args:
        folder: the iteration's folder.
        detect: value of `--auto-detect-ckpt-format`, with which Megatron takes a folder without
            `metadata.json` for a checkpoint in the format `torch_dcp`; without it, such a folder is
            an unfinished save.
    """
    legacy = any(path.name.startswith("mp_rank_0") for path in folder.iterdir())
    return not legacy and (not detect or (folder / CONFIG_FNAME).is_file())


def read_whole(folder: Path) -> dict[str, Any]:
    """The common state of an iteration whose files are all complete.

    Raises:
        ConfigError: with the first file that is not, and the last iteration that is complete.
    """
    try:
        return _read_whole(folder)
    except Damaged as damage:
        raise ConfigError(
            f"checkpoint {folder} is damaged: {damage}; {_remedy(folder.parent, folder)}"
        ) from damage


def problem_of(folder: Path) -> str | None:
    """The damage of an iteration, as part of a sentence; None if it is complete."""
    try:
        _read_whole(folder)
    except Damaged as damage:
        return str(damage)
    return None


def _read_whole(folder: Path) -> dict[str, Any]:
    _check_sizes(folder, read_metadata(folder))
    return read_common(folder)


def read_metadata(folder: Path) -> Metadata:
    """torch's metadata of the shards of an iteration.

    Raises:
        Damaged: if it is missing or unreadable.
    """
    # Megatron writes CONFIG_FNAME last, so a folder without it is an unfinished save.
    for name in (METADATA, CONFIG_FNAME):
        if not (folder / name).is_file():
            raise Damaged(f"{name} is missing, as after a save that did not end")
    try:
        config = maybe_load_config(str(folder))
    except (OSError, TypeError, ValueError) as error:
        raise Damaged(f"{CONFIG_FNAME} cannot be read ({type(error).__name__})") from error
    if config is None or config.sharded_backend != "torch_dist":
        raise Damaged(f"{CONFIG_FNAME} does not say torch_dist")
    try:
        metadata = FileSystemReader(folder).read_metadata()
    except Exception as error:  # a pickle can fail in any way
        raise Damaged(f"{METADATA} cannot be read ({type(error).__name__})") from error
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise Damaged(f"{METADATA} is not torch's")
    return metadata


def _check_sizes(folder: Path, metadata: Metadata) -> None:
    """Raise `Damaged` if a shard file is missing or shorter than the metadata says."""
    ends: dict[str, int] = {}
    for item in metadata.storage_data.values():
        ends[item.relative_path] = max(ends.get(item.relative_path, 0), item.offset + item.length)
    for name, end in sorted(ends.items()):
        path = folder / name
        if not path.is_file():
            raise Damaged(f"{name} is missing")
        if path.stat().st_size < end:
            raise Damaged(
                f"{name} is truncated, it has {path.stat().st_size} bytes where {METADATA} says "
                f"{end}"
            )


def read_common(folder: Path) -> dict[str, Any]:
    """The common state: the run's arguments, iteration, scheduler, and optimizer settings.

    Raises:
        Damaged: if it cannot be read.
    """
    try:
        with warnings.catch_warnings():
            # torch warns that there is no process group.
            warnings.simplefilter("ignore", UserWarning)
            return dict(load_common_state_dict(str(folder)))
    except (Exception, CheckpointException) as error:  # a pickle can fail in any way
        stored = read_metadata(folder).storage_data or {}
        names = [item.relative_path for key, item in stored.items() if key.fqn == COMMON_STATE]
        raise Damaged(
            f"{''.join(names) or METADATA} has no common state that can be read "
            f"({type(error).__name__})"
        ) from error


def args_in(common: dict[str, Any]) -> Namespace:
    """The run's arguments in a common state; an empty namespace if it has none."""
    args = common.get("args")
    return args if isinstance(args, Namespace) else Namespace()
