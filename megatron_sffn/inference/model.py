"""The model of a checkpoint with its weights, on the layout of this process.

Inputs: the folder of a run, and a layout. Outputs: Megatron's validated arguments, the tokenizer,
and Megatron's model in evaluation mode; the import of models builds its model here as well.

Design notes:
- The model's flags are the command line that the run stored in its checkpoint, without flags of
  its layout, its data, its results and its machine (`checkpoints/run_command.py`).
- Sequence parallelism is off: a step of generation has one token per sequence, which tensor
  parallel ranks cannot divide. Every tensor parallel rank then routes and sends all tokens.
- Data parallel ranks are replicas that Megatron does not need for inference, but expert parallel
  ranks are among them. So generation runs the same tokens on all of them, and `losses` gives each
  replica its part of the batch.
- Megatron's `GPTInferenceWrapper` is not used. It does not pass the input ids on, which RandHash
  needs on every pipeline stage, and the last of several stages casts its output to the dtype of
  the weights, so that a bf16 model would have other logits on two stages than on one. Its
  functions that send and receive hidden states are used.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import warnings
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sffn.inference.options import DTYPES, LAYOUT_FLAGS
from megatron_sffn.utils.errors import ConfigError

if TYPE_CHECKING:
    from megatron.core.inference.contexts import StaticInferenceContext
    from torch import Tensor

    from megatron_sffn.data.tokenize.tokenizer import Tokenizer


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
    from megatron_sffn.checkpoints import files
    from megatron_sffn.checks.pickles import check_data_only
    from megatron_sffn.patches.unpickling import trust

    if options.sffn_trust_checkpoint:
        trust()
    load: Path = options.load
    folder = files.folder_to_load(load, options.ckpt_step)
    if folder is None:
        missing = "does not exist" if not load.is_dir() else f"has no {files.TRACKER}"
        raise ConfigError(f"--load {load} {missing}; give the folder that a run was saved in")
    if not files.is_torch_dist(folder):
        raise ConfigError(
            f"checkpoint {folder} is not in the torch_dist format; save it with --ckpt-format "
            "torch_dist, which is the default"
        )
    check_data_only(folder)
    args = files.args_in(files.read_whole(folder))
    if "sffn_command" not in vars(args):
        raise ConfigError(
            f"checkpoint {folder} does not hold the command line of its run, which has the flags "
            "of the model; give one that megatron_sffn.pretrain or megatron-sffn import saved"
        )
    return Source(folder=folder, args=args)


def model_flags(saved: Namespace) -> list[str]:
    """The flags of a run that define its model and tokenizer, from a checkpoint's arguments."""
    from megatron_sffn.checkpoints.pickle_scan import without
    from megatron_sffn.checkpoints.run_command import (
        DATA,
        LAYOUT,
        MACHINE,
        RESULTS,
        TRAINING,
        flags_of,
    )

    flags = without(saved.sffn_command, flags_of(LAYOUT, RESULTS, DATA, TRAINING, MACHINE))
    # `reblock` changes the block size in the arguments, not in the command line.
    flags += ["--sffn-block-size", str(saved.sffn_block_size)]
    if saved.sffn_backend == "megatron":  # the one backend with weights of another form
        flags += ["--sffn-backend", "megatron"]
    return flags


def checked_args(source: Source, options: Namespace) -> Namespace:
    """Megatron's validated arguments for a checkpoint on the layout of the flags.

    Raises:
        ConfigError: the layout does not fit the model, or the tokenizer is another one.
    """
    from megatron_sffn.checkpoints.pickle_scan import without
    from megatron_sffn.checks.resume import check_checkpoint
    from megatron_sffn.flags.sffn_flags import sffn_config

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
    from megatron_sffn.patches import prepare
    from megatron_sffn.train.arguments import parse

    sizes = {dest: getattr(layout, dest) for dest in LAYOUT_FLAGS}
    for dest, size in sizes.items():
        if size < 1:
            flag = f"--{dest.replace('_', '-')}"
            raise ConfigError(f"{flag} {size} must be at least 1; give the number of its ranks")
    words = [*flags]
    for dest, size in sizes.items():
        words += [f"--{dest.replace('_', '-')}", str(size)]
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


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what Megatron prints from stdout, which is for results; on an error, print it."""
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch's, of a load in one process
            yield
    except ConfigError:
        raise
    except BaseException:
        print(output.getvalue(), file=sys.stderr, flush=True)
        raise


def initialize(args: Namespace) -> None:
    """Start Megatron in this process: global variables, process groups, seeds.

    Args:
        args: of `checked_args` or `parse_flags`.
    """
    import logging

    from megatron.training.global_vars import set_global_variables
    from megatron.training.initialize import initialize_megatron

    from megatron_sffn.data.tokenize.tokenizer import localize_tokenizer

    localize_tokenizer(args)
    args.exit_signal_handler = False
    for package in ("megatron", "megatron_sffn"):
        logging.getLogger(package).setLevel(logging.ERROR)
    with quiet():
        set_global_variables(args)
        initialize_megatron()
    logging.getLogger("megatron").setLevel(logging.ERROR)


def build_model(args: Namespace) -> Any:
    """Megatron's model of this rank's pipeline stage, with initial weights, in evaluation mode."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_sffn.flags.sffn_flags import sffn_config
    from megatron_sffn.train.run import model_config

    config = model_config(args, sffn_config(args))
    builder = config.get_builder_cls()(config)
    with quiet():
        (model,) = builder.build_distributed_models(
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
            wrap_with_ddp=False,
            data_parallel_random_init=False,
        )
    return model.eval()


def load_weights(model: Any) -> int:
    """Read the weights of Megatron's `--load` into a model; returns the iteration."""
    from megatron.training.checkpointing import load_checkpoint

    with quiet():
        iteration, _ = load_checkpoint([model], None, None)
    return int(iteration)


def load_model(source: Source, args: Namespace) -> InferenceModel:
    """Start Megatron, and load a checkpoint.

    Args:
        source: of `find_checkpoint`.
        args: of `checked_args`.
    """
    from megatron.training.global_vars import get_tokenizer

    from megatron_sffn.nn.layer import set_weights_version

    initialize(args)
    model = build_model(args)
    iteration = load_weights(model)
    set_weights_version(model, "loaded")  # so that the routers cache what follows from the weights
    return InferenceModel(
        args=args,
        module=model,
        tokenizer=get_tokenizer(),
        context=source.context,
        iteration=iteration,
    )


@dataclass(frozen=True, kw_only=True)
class InferenceModel:
    """A loaded model.

    Args:
        args: Megatron's arguments.
        module: Megatron's model of this rank's pipeline stage.
        tokenizer: of the run.
        context: the longest sequence that the model was trained on.
        iteration: of the checkpoint.
    """

    args: Namespace
    module: Any
    tokenizer: Tokenizer
    context: int
    iteration: int

    @property
    def vocab_size(self) -> int:
        """Number of ids of the tokenizer; the embedding may have more rows, which are padding."""
        return int(self.tokenizer.vocab_size)

    @cached_property
    def eod(self) -> int | None:
        """Id of the end of a document; None if the tokenizer has none."""
        from megatron_sffn.data.tokenize.tokenizer import eod_of

        return eod_of(self.tokenizer)

    @cached_property
    def needs_token_ids(self) -> bool:
        """Whether the sparse layers read the input ids."""
        from megatron_sffn.flags.sffn_flags import sffn_config

        sffn = sffn_config(self.args)
        return sffn is not None and sffn.router.needs_token_ids

    def forward(
        self,
        tokens: Tensor,
        *,
        start: int = 0,
        labels: Tensor | None = None,
        cache: StaticInferenceContext | None = None,
    ) -> Tensor | None:
        """Run tokens through all pipeline stages.

        Args:
            tokens: ids `[b, s]`, the same on all ranks of a replica.
            start: position of the first of them.
            labels: ids `[b, s]`, for losses.
            cache: keys and values of the tokens before `start`, to which those of these tokens are
                added.

        Returns:
            On the last stage, the losses `[b, s]` with labels, and the logits `[b, s, V]` without
            them, `[b, 1, V]` of the last token with a cache; None on other stages.
        """
        import torch
        from megatron.core import parallel_state
        from megatron.core.inference.communication_utils import (
            recv_from_prev_pipeline_rank_,
            send_to_next_pipeline_rank,
        )
        from megatron.core.utils import get_attr_wrapped_model

        group = parallel_state.get_pipeline_model_parallel_group()
        stage, num_stages = group.rank(), group.size()
        device = torch.cuda.current_device()
        tokens = tokens.to(device)
        positions = torch.arange(start, start + tokens.shape[1], device=device).expand_as(tokens)
        with torch.inference_mode():
            if num_stages > 1:
                received = None
                if stage > 0:
                    config = self.module.config
                    shape = (tokens.shape[1], tokens.shape[0], config.hidden_size)
                    dtype = torch.float if config.fp32_residual_connection else config.params_dtype
                    received = torch.empty(shape, dtype=dtype, device=device)
                    recv_from_prev_pipeline_rank_(received, group)
                get_attr_wrapped_model(self.module, "set_input_tensor")(received)
            output: Tensor = self.module(
                tokens,
                positions,
                None,  # Megatron's attention makes the causal mask
                labels=None if labels is None else labels.to(device),
                inference_context=cache,
                # The loss is computed from the logits of this rank's part of the vocabulary.
                runtime_gather_output=labels is None,
                padding_mask=tokens if self.needs_token_ids else None,
            )
            if cache is not None:
                cache.increment_sequence_len_offset(tokens.shape[1])
            if stage < num_stages - 1:
                send_to_next_pipeline_rank(output.contiguous(), group)
                return None
        return output

    def losses(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Loss of every label, on every rank; replicas share the work.

        Args:
            tokens: ids `[b, s]`, the same on all ranks.
            labels: ids `[b, s]`, the token that follows each.

        Returns:
            Losses in nats, `[b, s]` in fp32 on the CPU.
        """
        import torch
        from megatron.core import parallel_state

        replicas = parallel_state.get_data_parallel_group()
        share = -(-len(tokens) // replicas.size())
        # All replicas run a batch of one size, since expert parallel ranks wait for each other.
        mine = torch.arange(replicas.rank() * share, (replicas.rank() + 1) * share) % len(tokens)
        output = self.forward(tokens[mine], labels=labels[mine])
        stages = parallel_state.get_pipeline_model_parallel_group()
        if output is None:
            shape, device = (share, tokens.shape[1]), torch.cuda.current_device()
            output = torch.empty(shape, dtype=torch.float32, device=device)
        output = output.float().contiguous()
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        if stages.size() > 1:
            torch.distributed.broadcast(output, src=last, group=stages)
        parts = [torch.empty_like(output) for _ in range(replicas.size())]
        torch.distributed.all_gather(parts, output, group=replicas)
        return torch.cat(parts)[: len(tokens)].cpu()


def is_output_rank() -> bool:
    """Whether this rank prints and writes the results."""
    return os.environ.get("RANK", "0") == "0"


def finish() -> None:
    """End the process groups."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
