"""A training run: the model, the step functions, and the call of Megatron's `pretrain`.

Inputs: the validated namespace. Outputs: Megatron's checkpoints and TensorBoard events, and our
`summary.json`. The training loop is Megatron's; this module gives it batches, the forward step and
the loss function.
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
    hybrid_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.global_vars import set_global_variables
from megatron.training.models.base import ModelConfig
from torch import Tensor

from megatron_sffn.accounting import ModelShape
from megatron_sffn.checkpoints.save import Saves
from megatron_sffn.checks import optimizers
from megatron_sffn.checks.data import check_data
from megatron_sffn.checks.disk import check_saves
from megatron_sffn.checks.megatron_rules import as_sentence
from megatron_sffn.checks.problem import run_checks
from megatron_sffn.checks.resume import check_checkpoint
from megatron_sffn.data.loading.gpt_dataset import datasets_provider, next_batch
from megatron_sffn.data.tokenize.tokenizer import localize_tokenizer
from megatron_sffn.flags.sffn_flags import sffn_config, transformer_config
from megatron_sffn.nn.config import SparseFFNConfig
from megatron_sffn.nn.hybrid_spec import hybrid_stack_spec
from megatron_sffn.nn.layer import end_step, set_weights_version
from megatron_sffn.nn.layer_spec import block_spec, prediction_spec
from megatron_sffn.nn.reinit import reinit_dense_weights
from megatron_sffn.ops.compiled import kernels
from megatron_sffn.patches.cpu import is_host
from megatron_sffn.patches.registry import apply
from megatron_sffn.patches.run_hooks import PREDICTION_SPEC
from megatron_sffn.train import param_groups
from megatron_sffn.train.arguments_file import write_arguments
from megatron_sffn.train.hash_balance import balance_maps, counts_of_new_run
from megatron_sffn.train.nan_check import NanCheck
from megatron_sffn.train.progress_line import ProgressLine
from megatron_sffn.train.routing_trace import RoutingTracer
from megatron_sffn.train.run_texts import closing, opening
from megatron_sffn.train.signals import exit_on_signals
from megatron_sffn.train.summary import RunSummary
from megatron_sffn.train.watchdog import Watchdog
from megatron_sffn.utils.atomic_files import read_json_object


def train(args: Namespace) -> None:
    """Pretrain with these flags.

    Args:
        args: from `megatron_sffn.train.arguments.parse`.

    Raises:
        ConfigError: if the tokenizer, the data, the checkpoint or the disk do not fit the run; it
            is raised before any process group or file is created.
    """
    sffn = sffn_config(args)
    run_checks(optimizers.TRAINING_CHECKS, args)
    check_data(args)
    check_checkpoint(args, sffn)
    counts = counts_of_new_run(args)
    check_saves(args, sffn)
    localize_tokenizer(args)  # Megatron builds the tokenizer again, from the flags
    folder = run_folder(args)
    progress = ProgressLine(args, folder)
    run_summary = RunSummary(args, folder, RoutingTracer.of_args(args), progress)
    if sffn is not None and is_host():
        # Compile the kernels now, so that the first step does not wait for the compiler.
        kernels()
    with progress.in_place_of_log():
        shape = _pretrain(args, sffn, run_summary, progress, counts)
    path = run_summary.write_summary(shape)
    training_loss = run_summary.training_loss()
    if path is not None:
        print(closing(args, folder, read_json_object(path), training_loss), flush=True)
    torch.distributed.destroy_process_group()


def _pretrain(
    args: Namespace,
    sffn: SparseFFNConfig | None,
    run_summary: RunSummary,
    progress: ProgressLine,
    counts: Tensor | None,
) -> ModelShape:
    """Say what is trained, and call Megatron's `pretrain`; returns the model's shape."""
    nan_check = NanCheck(args)
    args.exit_signal_handler = True
    set_global_variables(args)
    exit_on_signals(args)
    shape = ModelShape.of_args(args, sffn)
    Saves(args, run_summary.before_save).install()
    run_summary.evaluations.install()
    param_groups.install(args)
    if args.rank == 0:
        progress.print(opening(args, sffn, shape, run_summary.folder, progress.log))
    token_keys = None if sffn is None else sffn.token_keys
    # The layers of --mtp-num-layers embed the ids on the last stage.
    ids_on_every_stage = token_keys is not None or args.mtp_num_layers is not None
    with as_sentence("start with these flags", is_over=lambda: run_summary.has_started):
        model = model_config(args, sffn, partial(finish_step, run_summary, nan_check))
        if counts is not None:
            model.pre_wrap_hooks.append(partial(balance_maps, counts))
        pretrain(
            pretrain_cfg_container_from_args(args, model),
            datasets_provider(on_every_stage=ids_on_every_stage),
            ModelType.encoder_or_decoder,
            partial(
                forward_step,
                run_summary,
                Watchdog(args),
                nan_check,
                token_keys=token_keys,
                ids_on_every_stage=ids_on_every_stage,
            ),
            non_loss_data_func=partial(finish_evaluation, run_summary, nan_check),
        )
    return shape


def model_config(
    args: Namespace,
    sffn: SparseFFNConfig | None,
    finalize_grads: Callable[..., None] | None = None,
) -> ModelConfig:
    """Megatron's config of a GPT or a hybrid model, with our layer spec if the model is sparse.

    Args:
        args: Megatron's validated namespace.
        sffn: the sparse layer; None for the dense baseline.
        finalize_grads: Megatron's `finalize_model_grads_func`; None without training.
    """
    config = transformer_config(args, sffn)
    # Megatron does not overwrite a hook that is set. It calls it once per step, on all ranks.
    config.finalize_model_grads_func = finalize_grads
    model: ModelConfig
    if args.hybrid_layer_pattern is not None:
        model = hybrid_config_from_args(args, config=config)
        model.hybrid_stack_spec = hybrid_stack_spec(config)
    else:
        model = gpt_config_from_args(args, config=config)
        model.rope_scaling_factor = args.rope_scaling_factor  # Megatron 0.19 ignores the flag: 8
        if sffn is not None:
            model.transformer_layer_spec = block_spec
            apply(PREDICTION_SPEC, _with_sparse_predictions)
    model.pre_wrap_hooks.append(partial(reinit_dense_weights, args.seed))
    return model


def _with_sparse_predictions(original: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron's spec of multi-token prediction, with our layers where a GPT has sparse layers."""

    def mtp_block_spec(model: Any, layers: Any, vp_stage: int | None = None) -> Any:
        config = model.transformer
        if config.mtp_num_layers is None or config.sffn is None:
            return original(model, layers, vp_stage)
        return prediction_spec(model, vp_stage)

    return mtp_block_spec


def finish_step(
    run_summary: RunSummary,
    nan_check: NanCheck,
    model: list[torch.nn.Module],
    *args: Any,
    **kwargs: Any,
) -> None:
    """Megatron's `finalize_model_grads_func`: called when all microbatches of a step have run.

    Args:
        run_summary: gets the counters of the step.
        nan_check: runs first, since Megatron's own checks of the gradients may end one rank alone.
        model: this rank's model chunks.
        args: arguments of Megatron's `finalize_model_grads`.
        kwargs: keyword arguments of Megatron's `finalize_model_grads`.
    """
    nan_check.after_step(model)
    finish_gradients(model, *args, **kwargs)
    run_summary.after_step(model, get_num_microbatches())


def finish_evaluation(
    run_summary: RunSummary, nan_check: NanCheck, model: list[torch.nn.Module]
) -> None:
    """Megatron's `non_loss_data_func`: called on all ranks when an evaluation ends.

    Args:
        run_summary: gets the result of the evaluation.
        nan_check: checks its scores and losses.
        model: this rank's model chunks.
    """
    nan_check.after_evaluation(model, run_summary.evaluations.current.iteration)
    run_summary.after_evaluation(model)


def finish_gradients(model: list[torch.nn.Module], *args: Any, **kwargs: Any) -> None:
    """Run Megatron's `finalize_model_grads`, then end the step in our layers.

    Args:
        model: this rank's model chunks.
        args: arguments of Megatron's `finalize_model_grads`.
        kwargs: keyword arguments of Megatron's `finalize_model_grads`.
    """
    finalize_model_grads(model, *args, **kwargs)
    for chunk in model:
        end_step(chunk)


def run_folder(args: Namespace) -> Path:
    """The folder of the results: `--save`, or `runs/` and a name made from router and sizes."""
    if args.save:
        return Path(args.save)
    name = args.sffn_router.replace(":", "-").replace(",", "-")
    if name != "dense":
        name += f"-g{args.sffn_block_size}-E{args.sffn_expansion}"
    return Path("runs") / f"{name}-seed{args.seed}"


def forward_step(
    run_summary: RunSummary,
    watchdog: Watchdog,
    nan_check: NanCheck,
    batches: Iterator[dict[str, Tensor]] | None,
    model: torch.nn.Module,
    *,
    token_keys: Callable[[Tensor], Tensor] | None,
    ids_on_every_stage: bool,
) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """Megatron's `forward_step`: one microbatch through this stage.

    Args:
        run_summary: times the step.
        watchdog: notes the progress.
        nan_check: gets the loss of every microbatch.
        batches: this stage's data iterator, if it has one.
        model: this stage's model chunk.
        token_keys: makes what the sparse layers read of the input ids; None if they read nothing.
            It is passed as Megatron's `padding_mask`: it is the only argument with a number per
            token that reaches the MLP of every stage and of every recomputation, in any order of
            microbatches.
        ids_on_every_stage: True if every stage reads the data.

    Returns:
        The stage's output, and the function that computes the loss from it on the last stage.
    """
    if not run_summary.has_started:
        write_arguments(run_summary.args, run_summary.folder)
    run_summary.before_forward(model.training)
    iteration = vars(run_summary.args).get("curr_iteration")
    watchdog.note(iteration or 0)
    # The weights change only when this value does: at most one optimizer step lies in between.
    set_weights_version(model, (iteration, model.training))
    batch = next_batch(batches, on_every_stage=ids_on_every_stage)
    if run_summary.tracer is not None:
        run_summary.tracer.before_forward(model, batch["tokens"])
    output = model(
        batch["tokens"],
        batch["position_ids"],
        batch["attention_mask"],
        labels=batch["labels"],
        # The layers of --mtp-num-layers read it; `loss_of` masks the loss of the model.
        loss_mask=batch["loss_mask"],
        padding_mask=None if token_keys is None else token_keys(batch["tokens"]),
    )
    return output, partial(loss_of, run_summary, nan_check, batch["loss_mask"], model.training)


def loss_of(
    run_summary: RunSummary,
    nan_check: NanCheck,
    loss_mask: Tensor,
    training: bool,
    output: Tensor,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Megatron's loss function.

    Args:
        run_summary: gets the loss of evaluated microbatches.
        nan_check: gets the loss of every microbatch.
        loss_mask: `[b, s]`, 1 for tokens that count.
        training: True if this is a training step.
        output: `[b, s]`, the loss of each token.

    Returns:
        The summed loss, the number of tokens in it, and both of them as `lm loss` for the log.
    """
    mask = loss_mask.reshape(-1).float()
    loss = (output.reshape(-1).float() * mask).sum()
    nan_check.note_loss(loss)
    tokens = mask.sum()
    report = torch.stack((loss, tokens)).detach()
    if training:
        run_summary.add_training_loss(report)
    else:
        run_summary.evaluations.add(report)
    return loss, tokens.int(), {"lm loss": report}
