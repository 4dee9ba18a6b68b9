"""From a checkpoint to Megatron's validated arguments, on the layout of this process.

Inputs: the folder of a run, and the flags of a layout. Outputs: Megatron's namespace, with which
`model.py` builds the model.

Design notes: the model's flags are the command line that the run stored in its checkpoint, without
flags of its layout, its data, its results and its machine (`checkpoints/run_command.py`). Nothing
of Megatron is started here, so everything that does not fit is refused within a second.
"""

from __future__ import annotations

import contextlib
import os
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols

from megatron_sffn.checkpoints import files
from megatron_sffn.checkpoints.pickle_scan import without
from megatron_sffn.checkpoints.run_command import (
    DATA,
    LAYOUT,
    MACHINE,
    RESULTS,
    TRAINING,
    flags_of,
)
from megatron_sffn.checks.pickles import check_data_only
from megatron_sffn.checks.resume import check_checkpoint
from megatron_sffn.flags.names import flag_of
from megatron_sffn.flags.sffn_flags import sffn_config
from megatron_sffn.inference.options import DTYPES, LAYOUT_FLAGS
from megatron_sffn.inference.quiet import quiet
from megatron_sffn.patches import prepare
from megatron_sffn.patches.unpickling import trust
from megatron_sffn.train.arguments import parse
from megatron_sffn.utils.errors import ConfigError

LAYERS = frozenset(
    {
        "--hybrid-layer-pattern",
        "--mtp-num-layers",
        "--num-layers",
        "--sffn-layers",
        "--sffn-model",
    }
)
"""The flags that say what the layers of a model are."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A checkpoint, before anything of it but its arguments is read.

    Args:
        folder: of the iteration.
        args: of the run that saved it.
    """

    folder: Path
    args: Namespace

    @property
    def context(self) -> int:
        """The longest sequence that the model was trained on."""
        return int(self.args.seq_length)


def find_checkpoint(options: Namespace) -> Source:
    """The checkpoint that the flags of `options.add_model_flags` name.

    Raises:
        ConfigError: there is none, it is damaged, it names code, or was not saved by this package.
    """
    if options.sffn_trust_checkpoint:
        trust()
    source = read_source(options.load, options.ckpt_step)
    if "sffn_command" not in vars(source.args):
        raise ConfigError(
            f"checkpoint {source.folder} does not hold the command line of its run, which has the "
            "flags of the model; give one that megatron_sffn.pretrain or megatron-sffn import saved"
        )
    return source


def read_source(load: Path, step: int | None) -> Source:
    """The iteration that a run would load, or that `step` names, and the arguments of its run.

    Raises:
        ConfigError: there is none, it is damaged, or it names code.
    """
    folder = files.folder_to_load(load, step)
    if folder is None:
        missing = f"has no {files.TRACKER}" if load.is_dir() else "does not exist"
        raise ConfigError(
            f"--load {load} {missing}; give the folder that a run was saved in, or --ckpt-step N"
        )
    if not files.is_torch_dist(folder):
        raise ConfigError(
            f"checkpoint {folder} is not in the torch_dist format; save it with --ckpt-format "
            "torch_dist, which is the default"
        )
    check_data_only(folder)
    return Source(folder=folder, args=files.args_in(files.read_whole(folder)))


def model_flags(saved: Namespace) -> list[str]:
    """The flags of a run that define its model and tokenizer, from a checkpoint's arguments."""
    flags = without(saved.sffn_command, flags_of(LAYOUT, RESULTS, DATA, TRAINING, MACHINE))
    # `reblock` changes the block size in the arguments, not in the command line.
    flags += ["--sffn-block-size", str(saved.sffn_block_size)]
    if vars(saved).get("hybrid_layer_pattern") is not None:
        # The stages of the run are not those of this layout.
        layers = saved.hybrid_layer_pattern.replace(Symbols.PIPE, "")
        flags = [*without(flags, LAYERS), "--hybrid-layer-pattern", layers]
    if not saved.bias_gelu_fusion:  # with it, dense layers compute GELU by tanh
        flags.append("--no-bias-gelu-fusion")
    if saved.sffn_backend == "megatron":  # the one backend with weights of another form
        flags += ["--sffn-backend", "megatron"]
    return flags


def checked_args(source: Source, options: Namespace) -> Namespace:
    """Megatron's validated arguments for a checkpoint on the layout of the flags.

    Raises:
        ConfigError: the layout does not fit the model, or the tokenizer is another one.
    """
    flags = model_flags(source.args)
    if options.tokenizer_model is not None:
        flags += ["--tokenizer-model", options.tokenizer_model]
    if options.dtype is not None:
        flags = [*without(flags, frozenset({"--bf16", "--fp16"})), *DTYPES[options.dtype]]
    flags += ["--load", str(options.load), "--no-load-optim", "--no-load-rng", "--skip-train"]
    if options.ckpt_step is not None:
        flags += ["--ckpt-step", str(options.ckpt_step)]
    args = parse_flags(flags, options)
    with quiet():
        check_checkpoint(args, sffn_config(args))
    rows = vars(source.args).get("padded_vocab_size")
    if rows is not None and rows % args.tensor_model_parallel_size == 0:
        args.padded_vocab_size = rows  # another TP pads to another size
    return args


def parse_flags(flags: Sequence[str], layout: Namespace) -> Namespace:
    """Megatron's validated arguments for the flags of a model, on a layout, for inference.

    Args:
        flags: of the model, without flags of a layout.
        layout: has the numbers of `LAYOUT_FLAGS`.

    Raises:
        ConfigError: the flags cannot work.
    """
    sizes = {dest: getattr(layout, dest) for dest in LAYOUT_FLAGS}
    for dest, size in sizes.items():
        if size < 1:
            raise ConfigError(
                f"{flag_of(dest)} {size} must be at least 1; give the number of its ranks"
            )
    words = [*flags]
    for dest, size in sizes.items():
        words += [flag_of(dest), str(size)]
    tp, pp = sizes["tensor_model_parallel_size"], sizes["pipeline_model_parallel_size"]
    if tp > 1:
        words.append("--sequence-parallel")  # as our checks demand of training
    replicas = max(1, int(os.environ["WORLD_SIZE"]) // (tp * pp))
    words += ["--micro-batch-size", "1", "--global-batch-size", str(replicas)]
    words += ["--train-iters", "1", "--eval-iters", "0"]
    defaults, _ = prepare()
    with _command_line(words), quiet():
        args = parse(defaults)
    args.sffn_command = [*flags]
    args.sequence_parallel = False
    return args


@contextlib.contextmanager
def _command_line(words: list[str]) -> Iterator[None]:
    """Let Megatron's parser, which reads `sys.argv`, read these words."""
    former, sys.argv = sys.argv, ["megatron-sffn", *words]
    try:
        yield
    finally:
        sys.argv = former
