"""Saves that leave a loadable checkpoint after a kill, a full disk or a second save of a step.

Inputs: Megatron's checkpoint writer, which writes into the folder of the iteration and then names
it in the tracker file. Outputs: its functions wrapped for this run. At any moment the tracker file
names a complete iteration.

Design notes:
- Megatron opens the tracker file and then writes it; a kill in between leaves it empty. This module
  makes that an atomic write.
- Megatron saves an iteration again when a finished run is started once more, or when the batch
  grows, into the folder that the tracker file names. If the folder holds this very state, it stays;
  if it holds another one, the tracker file first goes back to an earlier iteration.
- The folder is emptied before a save, because nobody could tell whether old and new files belong
  together. A save that fails leaves nothing.
- A synchronous save writes in this process, but Megatron starts a second one to hold the results. A
  signal to all processes of a job ends it, and the save that should follow the signal fails. So the
  results stay in this process, which also makes the first save 2 s faster.
- The free space on the disk is compared with the exact size before the first byte is written.
- Functions are replaced, although Megatron 0.19 keeps a save strategy in its checkpointing context:
  `pretrain` creates that context itself and accepts none from outside, and a strategy does not see
  the tracker file, `metadata.json` or the decision to save.
"""

from __future__ import annotations

import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CONFIG_FNAME
from megatron.core.rerun_state_machine import RerunState, get_rerun_state_machine
from megatron.training.checkpointing import get_loaded_iteration
from torch.distributed.checkpoint.api import CheckpointException

from megatron_sffn.checkpoints.disk_space import amount, free_bytes, on_all_ranks, written_bytes
from megatron_sffn.checkpoints.files import TRACKER, iteration_of, last_whole
from megatron_sffn.checkpoints.rewrite import point_to
from megatron_sffn.patches import run_hooks
from megatron_sffn.patches.registry import apply
from megatron_sffn.utils.atomic_files import atomic_write
from megatron_sffn.utils.errors import ConfigError


class Saves:
    """The saves of one run.

    Args:
        args: Megatron's namespace.
        before_save: called on all ranks before a save, with the model chunks and the iteration.
    """

    def __init__(self, args: Namespace, before_save: Callable[[Any, int], None]) -> None:
        self.args = args
        self.before_save = before_save
        self.last_saved: int | None = None

    def install(self) -> None:
        """Wrap Megatron's functions, unless checkpoints go to an object store."""
        if not self.args.enable_msc:
            apply(run_hooks.SAVE_ONCE, self._once)
            apply(run_hooks.SAVE_ATOMICALLY, self._complete_or_absent)
            apply(run_hooks.WRITE_TRACKER_ATOMICALLY, _atomic_tracker)
        if not self.args.async_save:
            apply(run_hooks.RESULTS_QUEUE)

    def _once(self, original: Callable[..., None]) -> Callable[..., None]:
        """Skip the save of a state that is on the disk already."""

        def save(iteration: int, model: Any, *args: Any, **kwargs: Any) -> None:
            is_persistent = not kwargs.get("non_persistent_ckpt", False)
            if is_persistent and self._is_saved(iteration):
                return
            self.before_save(model, iteration)
            original(iteration, model, *args, **kwargs)
            if is_persistent:
                self.last_saved = iteration

        return save

    def _is_saved(self, iteration: int) -> bool:
        """True if this run saved or loaded the iteration, and nothing has changed since."""
        if self.args.save is None:
            return True  # Megatron saves before a rerun even if there is no folder to save in
        if get_rerun_state_machine().state is RerunState.WILL_RERUN_FROM_CHECKPOINT:
            return False  # the state of the rerun has to go into the checkpoint, too
        args = self.args
        resumes = (
            args.load is not None
            and Path(args.load).resolve() == Path(args.save).resolve()
            and not (args.finetune or args.no_load_optim or args.no_load_rng)
        )
        return iteration in (self.last_saved, get_loaded_iteration() if resumes else None)

    def _complete_or_absent(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Save into an empty folder that fits the disk, and remove it if the save fails."""

        def save(sharded_state_dict: Any, checkpoint_dir: str, *args: Any, **kwargs: Any) -> Any:
            folder = Path(checkpoint_dir)
            is_first_rank = torch.distributed.get_rank() == 0
            if is_first_rank:
                empty_folder(folder)
            needed, free = on_all_ranks(written_bytes(sharded_state_dict), folder.parent)
            if free < needed:
                if is_first_rank:
                    folder.rmdir()
                raise ConfigError(_save_failed(folder, needed, f"has {amount(free)} free"))
            try:
                return original(sharded_state_dict, checkpoint_dir, *args, **kwargs)
            except (OSError, CheckpointException) as error:
                problem = f"has {amount(free_bytes(folder.parent))} free, and writing failed"
                if is_first_rank:
                    shutil.rmtree(folder)
                raise ConfigError(_save_failed(folder, needed, problem)) from error

        return save


def _save_failed(folder: Path, needed: int, problem: str) -> str:
    """The error message of a save that did not happen."""
    last = last_whole(folder.parent)
    saved = "no iteration is there" if last is None else f"iteration {last} is the last one there"
    return (
        f"checkpoint {folder} needs {amount(needed)}, but --save {folder.parent} {problem}; "
        f"{saved}: make room, and give the same command with --load to go on from it"
    )


def empty_folder(folder: Path) -> None:
    """Empty the folder of an iteration before it is written.

    The tracker file goes back to an earlier iteration first, or is removed.

    Args:
        folder: an existing folder of an iteration.
    """
    save = folder.parent
    tracker = save / TRACKER
    if tracker.is_file() and tracker.read_text().strip() == str(iteration_of(folder)):
        earlier = last_whole(save, but=folder)
        if earlier is None:
            tracker.unlink()
        else:
            point_to(save, earlier)
    # Megatron takes a folder without this file for no checkpoint, so this one goes first.
    (folder / CONFIG_FNAME).unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _atomic_tracker(original: Callable[..., Any]) -> Callable[..., Any]:
    """Write the tracker file atomically: it has the former number or the new one."""

    def open_file(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if Path(path).name == TRACKER and mode == "w":
            return atomic_write(Path(path), durable=True)
        return original(path, mode, *args, **kwargs)

    return open_file
