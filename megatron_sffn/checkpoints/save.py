"""Saves that a kill, a full disk or a second save of the same step leave loadable.

Enters: Megatron's writer of checkpoints, which writes into the folder of the iteration and then
names it in the tracker file. Leaves: its functions wrapped for this run; at any moment, the tracker
file names an iteration that is whole.

Choices
- Megatron opens the tracker file and then writes it; a kill in between leaves it empty. Here it is
  replaced at once.
- Megatron saves an iteration again when a finished run is started once more, or when the batch
  grows, into the folder that the tracker file names. Here what lies there is kept if it is this
  very state; if it is another, the tracker file first goes back to an earlier iteration.
- A folder is emptied before it is written: of old files and new ones nobody could tell whether
  they belong together. A save that fails leaves nothing.
- A save that waits writes in this process, but Megatron starts another one to hold the results; a
  signal to all processes of a job ends that one, and the save that should follow it fails. Here
  the results stay, which also makes the first save 2 s faster.
- The room on the disk is compared with the exact size before the first byte is written.
"""

from __future__ import annotations

import queue
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
from megatron_sffn.patches.registry import Adaptation, apply
from megatron_sffn.utils.atomic_files import atomic_write
from megatron_sffn.utils.errors import ConfigError

OWN_QUEUE = Adaptation(
    target="megatron.core.dist_checkpointing.strategies.filesystem_async.get_write_results_queue",
    make=lambda _: lambda mp_mode="spawn": queue.Queue(),
    needed_by="megatron.core.dist_checkpointing.strategies.filesystem_async.FileSystemWriterAsync",
)
"""What a save that waits passes to itself."""


class Saves:
    """The saves of one run.

    Args:
        args: Megatron's namespace.
        before: called on all ranks before a save, with the model's chunks and the iteration.
    """

    def __init__(self, args: Namespace, before: Callable[[Any, int], None]) -> None:
        self.args = args
        self.before = before
        self.saved: int | None = None

    def install(self) -> None:
        """Wrap Megatron's functions, where checkpoints are files."""
        for adaptation in () if self.args.enable_msc else self.adaptations():
            apply(adaptation)
        if not self.args.async_save:
            apply(OWN_QUEUE)

    def adaptations(self) -> tuple[Adaptation, ...]:
        """Every name that is wrapped, with the Megatron code that needs it."""
        return (
            Adaptation(
                target="megatron.training.training.save_checkpoint",
                make=self._once,
                needed_by="megatron.training.training.save_checkpoint_and_time",
            ),
            Adaptation(
                target="megatron.core.dist_checkpointing.save",
                make=self._whole_or_not_at_all,
                needed_by="megatron.training.checkpointing.save_checkpoint",
            ),
            Adaptation(
                target="megatron.training.checkpointing.maybe_msc.open",
                make=_tracker_at_once,
                needed_by="megatron.training.checkpointing.save_checkpoint",
            ),
        )

    def _once(self, original: Callable[..., None]) -> Callable[..., None]:
        """A state that is on the disk is not saved again."""

        def save(iteration: int, model: Any, *args: Any, **kwargs: Any) -> None:
            elsewhere = kwargs.get("non_persistent_ckpt", False)
            if not elsewhere and self._is_there(iteration):
                return
            self.before(model, iteration)
            original(iteration, model, *args, **kwargs)
            if not elsewhere:
                self.saved = iteration

        return save

    def _is_there(self, iteration: int) -> bool:
        """Whether this run saved or loaded the iteration, and nothing has changed since."""
        if self.args.save is None:
            return True  # nowhere; Megatron saves before a rerun whether or not there is a folder
        if get_rerun_state_machine().state is RerunState.WILL_RERUN_FROM_CHECKPOINT:
            return False  # which a checkpoint remembers, too
        args = self.args
        loaded = (
            args.load is not None
            and Path(args.load).resolve() == Path(args.save).resolve()
            and not (args.finetune or args.no_load_optim or args.no_load_rng)
        )
        return iteration in (self.saved, get_loaded_iteration() if loaded else None)

    def _whole_or_not_at_all(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """The folder of an iteration is new, fits the disk, and goes if it is not finished."""

        def save(sharded_state_dict: Any, checkpoint_dir: str, *args: Any, **kwargs: Any) -> Any:
            folder = Path(checkpoint_dir)
            first = torch.distributed.get_rank() == 0
            if first:
                make_way(folder)
            needed, free = on_all_ranks(written_bytes(sharded_state_dict), folder.parent)
            if free < needed:
                if first:
                    folder.rmdir()
                raise ConfigError(_no_room(folder, needed, f"has {amount(free)} free"))
            try:
                return original(sharded_state_dict, checkpoint_dir, *args, **kwargs)
            except (OSError, CheckpointException) as error:
                left = f"has {amount(free_bytes(folder.parent))} free, and writing failed"
                if first:
                    shutil.rmtree(folder)
                raise ConfigError(_no_room(folder, needed, left)) from error

        return save


def _no_room(folder: Path, needed: int, why: str) -> str:
    """The sentence about a save that did not happen."""
    last = last_whole(folder.parent)
    kept = "no iteration is there" if last is None else f"iteration {last} is the last one there"
    return (
        f"checkpoint {folder} needs {amount(needed)}, but --save {folder.parent} {why}; {kept}: "
        "make room, and give the same command with --load to go on from it"
    )


def make_way(folder: Path) -> None:
    """Empty the folder of an iteration that is about to be written.

    Args:
        folder: that is there.
    """
    save = folder.parent
    tracker = save / TRACKER
    if tracker.is_file() and tracker.read_text().strip() == str(iteration_of(folder)):
        earlier = last_whole(save, but=folder)
        if earlier is None:
            tracker.unlink()
        else:
            point_to(save, earlier)
    # First the file without which the others are not taken for a checkpoint.
    (folder / CONFIG_FNAME).unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _tracker_at_once(original: Callable[..., Any]) -> Callable[..., Any]:
    """The tracker file says the former number or the new one."""

    def opened(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if Path(path).name == TRACKER and mode == "w":
            return atomic_write(Path(path), durable=True)
        return original(path, mode, *args, **kwargs)

    return opened
