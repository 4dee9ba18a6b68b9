"""Flags to a finished run: the model, the step functions, and Megatron's `pretrain`.

Enters: the validated namespace. Leaves: Megatron's checkpoints and events, and our summary. There
is no training loop here: batches, forward and loss are handed to Megatron's.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.training import pretrain
from megatron.training.argument_utils import (
    gpt_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.global_vars import set_global_variables
from megatron.training.models.gpt import GPTModelConfig
from torch import Tensor

from megatron_sffn.accounting import ModelShape, table
from megatron_sffn.checkpoints.disk_space import check_saves
from megatron_sffn.checkpoints.save import Saves
from megatron_sffn.checks.data import check_data
from megatron_sffn.checks.megatron_rules import as_sentence
from megatron_sffn.checks.resume import check_checkpoint
from megatron_sffn.data.loading.gpt_dataset import datasets_provider, next_batch
from megatron_sffn.data.tokenize.tokenizer import localize_tokenizer
from megatron_sffn.flags.megatron_flags import exchange_of
from megatron_sffn.flags.sffn_flags import sffn_config, transformer_config
from megatron_sffn.nn.config import SparseFFNConfig
from megatron_sffn.nn.init import reinit_dense_weights
from megatron_sffn.nn.layer import end_step, set_weights_version
from megatron_sffn.nn.layer_spec import block_spec
from megatron_sffn.ops.compiled import kernels
from megatron_sffn.patches.cpu import is_host
from megatron_sffn.train.nan_check import NanCheck
from megatron_sffn.train.routing_trace import RoutingRecorder
from megatron_sffn.train.signals import exit_on_signals
from megatron_sffn.train.summary import Recorder
from megatron_sffn.train.watchdog import Watchdog


def train(args: Namespace) -> None:
    """Pretrain as the flags say.

    Args:
        args: from `megatron_sffn.train.arguments.parse`.

    Raises:
        ConfigError: if tokenizer, data, checkpoint or disk do not fit, before any process group or
            file is made.
    """
    sffn = sffn_config(args)
    check_data(args)
    check_checkpoint(args, sffn)
    check_saves(args, sffn)
    localize_tokenizer(args)  # Megatron builds it again, from the flags
    recorder = Recorder(args, run_folder(args), RoutingRecorder.of_args(args))
    nan_check = NanCheck(args)
    if sffn is not None and is_host():
        # Compiled now, or not at all: the first step is no time to learn which.
        kernels()
    args.exit_signal_handler = True
    set_global_variables(args)
    exit_on_signals(args)
    shape = ModelShape.of_args(args, sffn)
    Saves(args, recorder.before_save).install()
    recorder.evaluations.install()
    if args.rank == 0:
        print(table(shape, exchange_of(args), args.moe_token_dispatcher_type), flush=True)
        remark = None if sffn is None else sffn.router.remark(sffn)
        if remark is not None:
            print(f"note: {remark}", flush=True)
    hashed = sffn is not None and sffn.router.needs_token_ids
    with as_sentence("start with these flags", is_over=lambda: recorder.has_started):
        pretrain(
            pretrain_cfg_container_from_args(args, model_config(args, sffn, recorder, nan_check)),
            datasets_provider(on_every_stage=hashed),
            ModelType.encoder_or_decoder,
            partial(forward_step, recorder, Watchdog(args), nan_check, hashed),
            non_loss_data_func=partial(finish_evaluation, recorder, nan_check),
        )
    path = recorder.write_summary(shape)
    if path is not None:
        print(f"summary: {path}", flush=True)
    torch.distributed.destroy_process_group()


def model_config(
    args: Namespace, sffn: SparseFFNConfig | None, recorder: Recorder, nan_check: NanCheck
) -> GPTModelConfig:
    """Megatron's model config, with our layers in it if the model is sparse."""
    config = transformer_config(args, sffn)
    # Megatron keeps a hook that is there; it is called once per step, on all ranks.
    config.finalize_model_grads_func = partial(finish_step, recorder, nan_check)
    model: GPTModelConfig = gpt_config_from_args(args, config=config)
    model.rope_scaling_factor = args.rope_scaling_factor  # which Megatron 0.19 leaves at 8
    model.pre_wrap_hooks.append(partial(reinit_dense_weights, args.seed))
    if sffn is not None:
        model.transformer_layer_spec = block_spec
    return model


def finish_step(
    recorder: Recorder,
    nan_check: NanCheck,
    model: list[torch.nn.Module],
    *args: Any,
    **kwargs: Any,
) -> None:
    """All microbatches of a step have run: finish their gradients, and log what was counted.

    Args:
        recorder: of the run.
        nan_check: of the run; it looks first, because Megatron's own checks of the gradients may
            end one rank alone.
        model: this rank's chunks.
        args: as Megatron's `finalize_model_grads`.
        kwargs: as Megatron's `finalize_model_grads`.
    """
    nan_check.after_step(model)
    finish_gradients(model, *args, **kwargs)
    recorder.after_step(model, get_num_microbatches())


def finish_evaluation(
    recorder: Recorder, nan_check: NanCheck, model: list[torch.nn.Module]
) -> None:
    """Megatron's `non_loss_data_func`: called on all ranks when an evaluation ends.

    Args:
        recorder: of the run.
        nan_check: of the run.
        model: this rank's chunks.
    """
    nan_check.after_evaluation(model, recorder.evaluations.current.iteration)
    recorder.after_evaluation(model)


def finish_gradients(model: list[torch.nn.Module], *args: Any, **kwargs: Any) -> None:
    """Megatron's end of the gradients, then that of our layers.

    Args:
        model: this rank's chunks.
        args: as Megatron's `finalize_model_grads`.
        kwargs: as Megatron's `finalize_model_grads`.
    """
    finalize_model_grads(model, *args, **kwargs)
    for chunk in model:
        end_step(chunk)


def run_folder(args: Namespace) -> Path:
    """Where results go: `--save`, or `runs/` and a name from the router and its numbers."""
    if args.save:
        return Path(args.save)
    name = args.sffn_router
    if name != "dense":
        name += f"-g{args.sffn_block_size}-E{args.sffn_expansion}"
    return Path("runs") / f"{name}-seed{args.seed}"


def forward_step(
    recorder: Recorder,
    watchdog: Watchdog,
    nan_check: NanCheck,
    hashed: bool,
    batches: Iterator[dict[str, Tensor]] | None,
    model: torch.nn.Module,
) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """Megatron's `forward_step`: one microbatch through this stage.

    Args:
        recorder: of the run.
        watchdog: of the run.
        nan_check: of the run.
        hashed: whether the sparse layers read the input ids, which then go where Megatron has a
            `padding_mask`: the only slot for a number per token that reaches the MLP of every stage
            and of every recomputation, whatever the order of microbatches.
        batches: this stage's data iterator, if it has one.
        model: this stage's model (chunk).

    Returns:
        The stage's output, and the function that makes a loss of it on the last stage.
    """
    recorder.before_forward(model.training)
    iteration = vars(recorder.args).get("curr_iteration")
    watchdog.note(iteration or 0)
    # Between two values the optimizer takes one step, or none.
    set_weights_version(model, (iteration, model.training))
    batch = next_batch(batches, on_every_stage=hashed)
    if recorder.blocks is not None:
        recorder.blocks.before_forward(model, batch["tokens"])
    output = model(
        batch["tokens"],
        batch["position_ids"],
        batch["attention_mask"],
        labels=batch["labels"],
        # Acts in the layers of --mtp-num-layers; of ours, `loss_of` masks the loss.
        loss_mask=batch["loss_mask"],
        padding_mask=batch["tokens"] if hashed else None,
    )
    return output, partial(loss_of, recorder, nan_check, batch["loss_mask"], model.training)


def loss_of(
    recorder: Recorder,
    nan_check: NanCheck,
    loss_mask: Tensor,
    training: bool,
    output: Tensor,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Megatron's loss function.

    Args:
        recorder: gets the loss of evaluated microbatches.
        nan_check: gets the loss of every microbatch.
        loss_mask: `[b, s]`, 1 for tokens that count.
        training: whether this is a training step.
        output: `[b, s]` loss of each token.

    Returns:
        The summed loss, the number of tokens in it, and both as `lm loss` for the log.
    """
    mask = loss_mask.reshape(-1).float()
    loss = (output.reshape(-1).float() * mask).sum()
    nan_check.note_loss(loss)
    tokens = mask.sum()
    report = torch.stack((loss, tokens)).detach()
    if not training:
        recorder.evaluations.add(report)
    return loss, tokens.int(), {"lm loss": report}
