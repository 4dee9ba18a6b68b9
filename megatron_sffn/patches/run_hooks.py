"""Functions of Megatron that a run wraps: saves, evaluations, a spec, groups, a list of arguments.

The run applies these patches, because the wrappers need its state, its flags or our layer:
`checkpoints/save.py` those of saves, `train/evaluations.py` that of evaluations, `train/run.py`
that of the spec, `train/param_groups.py` that of parameter groups, `train/arguments_file.py` that
of the list of arguments.
"""

from __future__ import annotations

import queue

from megatron_sffn.patches.registry import Patch

SAVE_ONCE = Patch(
    target="megatron.training.training.save_checkpoint",
    needed_by="megatron.training.training.save_checkpoint_and_time",
    why="an iteration that is on the disk already would be saved again, over itself",
    until="Megatron skips the save of an iteration that it has just saved or loaded",
)

SAVE_ATOMICALLY = Patch(
    target="megatron.core.dist_checkpointing.save",
    needed_by="megatron.training.checkpointing.save_checkpoint",
    why="a save into a folder with old files, or onto a full disk, leaves a damaged checkpoint",
    until="`megatron.training.pretrain` accepts a save strategy that covers the whole folder",
)

WRITE_TRACKER_ATOMICALLY = Patch(
    target="megatron.training.checkpointing.maybe_msc.open",
    needed_by="megatron.training.checkpointing.save_checkpoint",
    why="a kill between opening and writing the tracker file leaves it empty",
    until="Megatron writes the tracker file atomically",
)

RESULTS_QUEUE = Patch(
    target="megatron.core.dist_checkpointing.strategies.filesystem_async.get_write_results_queue",
    make=lambda _: lambda mp_mode="spawn": queue.Queue(),
    needed_by="megatron.core.dist_checkpointing.strategies.filesystem_async.FileSystemWriterAsync",
    why="a synchronous save keeps its results in a second process, which a signal to the job ends",
    until="Megatron keeps the results of a synchronous save in the process that writes them",
)

EVALUATE = Patch(
    target="megatron.training.training.evaluate_and_print_results",
    needed_by="megatron.training.training.train",
    why="the hook that is called after an evaluation gets neither the step nor the data set",
    until="Megatron passes both to `non_loss_data_func`",
)

PREDICTION_SPEC = Patch(
    target="megatron.training.models.gpt.mtp_block_spec",
    needed_by="megatron.training.models.gpt.GPTModelBuilder",
    why="layers of multi-token prediction have Megatron's experts in place of sparse layers",
    until="Megatron takes these layers from the spec of the GPT's last layer",
)

PARAM_GROUPS = Patch(
    target="megatron.core.optimizer._get_param_groups",
    needed_by="megatron.core.optimizer._get_param_groups_and_buffers",
    why="--sffn-lr-mult would replace the rates of --use-mup, and Megatron refuses two rates",
    until="Megatron has an override that multiplies the learning rate",
)

PRINT_ARGUMENTS = Patch(
    target="megatron.training.arguments._print_args",
    needed_by="megatron.training.arguments.validate_args",
    why="every run opens with 900 lines of arguments",
    until="Megatron has a flag to leave them out",
)

PATCHES = (
    SAVE_ONCE,
    SAVE_ATOMICALLY,
    WRITE_TRACKER_ATOMICALLY,
    RESULTS_QUEUE,
    EVALUATE,
    PREDICTION_SPEC,
    PARAM_GROUPS,
    PRINT_ARGUMENTS,
)
