"""Checks that a run can resume from a checkpoint: same model, and an optimizer state that fits.

Inputs: the run's validated arguments, and the checkpoint that `--load` names. Outputs: notes on
stdout about differences that do no harm.

Design notes: Megatron would notice most mismatches as well, but minutes later and as a missing
tensor. Flags are compared, not the shapes that follow from them, so that the sentence can name the
flag. Every other parallel layout passes, since Megatron reshards the tensors.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.training.vocab_utils import calculate_padded_vocab_size

from megatron_sffn.checkpoints.files import (
    TRACKER,
    args_in,
    folder_to_load,
    is_torch_dist,
    read_whole,
)
from megatron_sffn.checks.model_flags import (
    model_differences,
    router_differences,
    saved_layer,
    span_differences,
)
from megatron_sffn.checks.optimizer_state import jump_of_the_rate, misfits
from megatron_sffn.checks.pickles import check_data_only
from megatron_sffn.checks.problem import Problem, run_checks
from megatron_sffn.data.tokenize.tokenizer import load_tokenizer
from megatron_sffn.nn.config import Backend, SparseFFNConfig
from megatron_sffn.patches.unpickling import trust


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The iteration that a run loads.

    Args:
        folder: folder of the iteration.
        common: everything in it but the shards.
    """

    folder: Path
    common: dict[str, Any]

    @property
    def is_plain_megatron(self) -> bool:
        """True if it was saved without the `--sffn` flags."""
        return "sffn_router" not in vars(args_in(self.common))

    @property
    def args(self) -> Namespace:
        """The arguments of the run that saved it."""
        saved = args_in(self.common)
        if self.is_plain_megatron:
            saved = Namespace(**vars(saved), sffn_router="dense", sffn_relu=False)
        return saved


def check_checkpoint(args: Namespace, sffn: SparseFFNConfig | None) -> None:
    """Look at the checkpoint that `--load` names, before anything starts.

    Args:
        args: Megatron's validated namespace.
        sffn: the sparse layer; None for the dense baseline.

    Raises:
        ConfigError: if it names code, is damaged, is of another model, or its optimizer's state
            does not fit.
    """
    if args.sffn_trust_checkpoint:
        trust()
    run_checks([step_without_load], args)
    folder = checkpoint_to_load(args)
    if folder is None:
        return
    if args.rank == 0:
        check_data_only(folder)
    detect = args.auto_detect_ckpt_format
    if args.ckpt_format != "torch_dist" or not is_torch_dist(folder, detect=detect):
        return
    checkpoint = Checkpoint(folder=folder, common=read_whole(folder))
    run_checks(CHECKS, args, sffn, checkpoint)
    if args.rank == 0:
        for note in _notes(args, sffn, checkpoint):
            print(note, flush=True)


def step_without_load(args: Namespace) -> Iterator[Problem]:
    """An iteration to load without a folder to load it from."""
    if args.load is None and args.ckpt_step is not None:
        rule = "has nothing to act on without --load"
        yield Problem("--ckpt-step", args.ckpt_step, rule, "add --load DIR")


def checkpoint_to_load(args: Namespace) -> Path | None:
    """The iteration that Megatron will load; None if it starts from scratch or looks elsewhere."""
    if args.enable_msc or args.non_persistent_ckpt_type:
        return None
    load, pretrained = args.load, args.pretrained_checkpoint
    if pretrained is not None and (load is None or not (Path(load) / TRACKER).is_file()):
        load = pretrained
    return None if load is None else folder_to_load(Path(load), args.ckpt_step)


def _loads_optimizer_state(args: Namespace, folder: Path) -> bool:
    """True if Megatron loads the optimizer's state as well as the weights."""
    is_new = args.no_load_optim or args.finetune or folder.name == "release"
    return not is_new and args.load is not None and folder.parent == Path(args.load)


# The model


def plain_megatron(
    args: Namespace, sffn: SparseFFNConfig | None, checkpoint: Checkpoint
) -> Iterator[Problem]:
    """Checkpoints of plain Megatron, if they or the run have sparse layers or experts."""
    experts = vars(args_in(checkpoint.common)).get("num_experts")
    if checkpoint.is_plain_megatron and not (sffn is None and experts is None):
        layers = "dense layers" if experts is None else f"{experts} experts of Megatron"
        remedy = "leave out --load" if experts is not None else "use --sffn-router dense"
        yield Problem(
            "checkpoint",
            checkpoint.folder,
            f"was saved by plain Megatron, with {layers} and no --sffn flags",
            f"{remedy}, or load a checkpoint that megatron_sffn.pretrain saved",
        )


def other_model(
    args: Namespace, sffn: SparseFFNConfig | None, checkpoint: Checkpoint
) -> Iterator[Problem]:
    """Flags of the model that differ from those of the checkpoint."""
    for flag, saved_flag in model_differences(args, checkpoint.args, sffn):
        yield Problem(
            flag,
            None,
            f", but the checkpoint {checkpoint.folder} was saved with {saved_flag}",
            "use that, or load another checkpoint",
            lead="this run has ",
        )


# Settings that may differ, within limits


def attention_span(
    args: Namespace, sffn: SparseFFNConfig | None, checkpoint: Checkpoint
) -> Iterator[Problem]:
    """Another reach of attention than the checkpoint's, without `--finetune`."""
    if args.finetune:
        return
    for flag, saved_flag in span_differences(args, checkpoint.args):
        yield Problem(
            flag,
            None,
            f", but the checkpoint was saved with {saved_flag}",
            "use that, or add --finetune to train its weights on with another reach of attention "
            f"(checkpoint {checkpoint.folder})",
            lead="this run has ",
        )


def block_size(
    args: Namespace, sffn: SparseFFNConfig | None, checkpoint: Checkpoint
) -> Iterator[Problem]:
    """Another block size than the checkpoint's, if the checkpoint stores weights per block."""
    if sffn is None or sffn.block_size == checkpoint.args.sffn_block_size:
        return
    change = f"differs from the checkpoint's {checkpoint.args.sffn_block_size}"
    if sffn.backend is Backend.MEGATRON:
        yield Problem(
            "--sffn-block-size",
            sffn.block_size,
            f"{change}, whose experts Megatron stores one by one",
            f"use that (checkpoint {checkpoint.folder})",
        )
        return
    saved_sffn = saved_layer(checkpoint.args)
    width = sffn.router_width(args.hidden_size)
    reasons = [router.bound_to_blocks(saved_sffn, sffn, width) for router in sffn.routers]
    for reason in filter(None, reasons):
        yield Problem(
            "--sffn-block-size",
            sffn.block_size,
            f"{change}: {reason}",
            f"use that (checkpoint {checkpoint.folder})",
        )
    gated = [
        router.name
        for router in sffn.routers
        if router.per_block_weights or router.splitting_divides_gates
    ]
    if gated:
        yield Problem(
            "--sffn-block-size",
            sffn.block_size,
            f"{change}, and --sffn-router {gated[0]} has a gate of every block",
            "use that, or cut them anew with tools/convert_checkpoint.py reblock --load "
            f"{args.load} --save DIR --block-size {sffn.block_size} (checkpoint "
            f"{checkpoint.folder})",
        )


def embedding_rows(
    args: Namespace, sffn: SparseFFNConfig | None, checkpoint: Checkpoint
) -> Iterator[Problem]:
    """Tokenizers whose vocabulary, padded as in the checkpoint, has another number of rows."""
    saved = checkpoint.args
    rows, divisor = (
        vars(saved).get(name) for name in ("padded_vocab_size", "make_vocab_size_divisible_by")
    )
    if rows is None or divisor is None or args.padded_vocab_size is not None:
        return
    ids = load_tokenizer(args).vocab_size
    padded = calculate_padded_vocab_size(ids, divisor, saved.tensor_model_parallel_size, False)
    if padded != rows:
        model = f" --tokenizer-model {saved.tokenizer_model}" if saved.tokenizer_model else ""
        size = f" --vocab-size {saved.vocab_size}" if saved.vocab_size else ""
        yield Problem(
            f"the tokenizer's {ids} ids",
            None,
            f"make {padded} rows of the embedding, padded as in the checkpoint, which has {rows}",
            f"use the tokenizer it was trained with: --tokenizer-type {saved.tokenizer_type}{model}"
            f"{size} (checkpoint {checkpoint.folder})",
        )


def optimizer_state(
    args: Namespace, sffn: SparseFFNConfig | None, checkpoint: Checkpoint
) -> Iterator[Problem]:
    """An optimizer, precision, schedule or random state that does not fit the checkpoint's."""
    if not _loads_optimizer_state(args, checkpoint.folder):
        return
    for sentence in misfits(args, {**checkpoint.common, "args": checkpoint.args}):
        subject, _, remedy = sentence.partition("; ")
        flag, _, rule = subject.partition(" ")
        yield Problem(flag, None, rule, f"{remedy} (checkpoint {checkpoint.folder})")


CHECKS = (
    plain_megatron,
    other_model,
    attention_span,
    block_size,
    embedding_rows,
    optimizer_state,
)


def _notes(args: Namespace, sffn: SparseFFNConfig | None, checkpoint: Checkpoint) -> Iterator[str]:
    """Differences that do no harm, for the log."""
    saved = checkpoint.args
    if sffn is not None:
        saved_sffn = saved_layer(saved)
        if sffn.block_size != saved_sffn.block_size:
            jump = "; the hash draws them anew, so the loss jumps"
            yield (
                f"block size {saved_sffn.block_size} of the checkpoint -> {sffn.block_size}: same "
                f"memory, other blocks{jump if sffn.token_keys else ''}"
            )
        for flag, saved_flag in router_differences(sffn, saved_sffn, training_only=True):
            yield f"{saved_flag} of the checkpoint -> {flag}: the model is the same"
    if checkpoint.is_plain_megatron:
        yield "the checkpoint was saved by plain Megatron: it has no --sffn flags to compare"
    if _loads_optimizer_state(args, checkpoint.folder):
        yield from jump_of_the_rate(args, {**checkpoint.common, "args": saved})
