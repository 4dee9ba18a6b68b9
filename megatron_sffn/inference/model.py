"""The model of a checkpoint with its weights, on the layout of this process.

Inputs: Megatron's arguments of `checkpoint_args.py`. Outputs: the tokenizer, and Megatron's model
in evaluation mode; the import of models builds its model here as well.

Design notes:
- Sequence parallelism is off: a step of generation has one token per sequence, which tensor
  parallel ranks cannot divide. Every tensor parallel rank then routes and sends all tokens.
- Data parallel ranks are replicas that Megatron does not need for inference, but expert parallel
  ranks are among them. So generation runs the same tokens on all of them, and `score` gives each
  replica its part of the batch.
- Megatron's `GPTInferenceWrapper` is not used. It does not pass the input ids on, which RandHash
  needs on every pipeline stage, and the last of several stages casts its output to the dtype of
  the weights, so that a bf16 model would have other logits on two stages than on one. Its
  functions that send and receive hidden states are used.
"""

from __future__ import annotations

import logging
import os
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.inference.communication_utils import (
    recv_from_prev_pipeline_rank_,
    send_to_next_pipeline_rank,
)
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.rerun_state_machine import destroy_rerun_state_machine
from megatron.core.utils import get_attr_wrapped_model
from megatron.training.checkpointing import load_checkpoint
from megatron.training.global_vars import (
    destroy_global_vars,
    get_tokenizer,
    set_global_variables,
)
from megatron.training.initialize import initialize_megatron
from torch import Tensor

from megatron_sffn.data.tokenize.tokenizer import Tokenizer, eod_of, localize_tokenizer
from megatron_sffn.flags.sffn_flags import sffn_config
from megatron_sffn.inference.checkpoint_args import Source
from megatron_sffn.inference.quiet import quiet
from megatron_sffn.nn.layer import set_weights_version
from megatron_sffn.train.run import model_config


def initialize(args: Namespace) -> None:
    """Start Megatron in this process: global variables, process groups, seeds.

    Args:
        args: of `checked_args` or `parse_flags`.
    """
    localize_tokenizer(args)
    args.exit_signal_handler = False
    for package in ("megatron", "megatron_sffn"):
        logging.getLogger(package).setLevel(logging.ERROR)
    with quiet():
        set_global_variables(args)
        initialize_megatron()
    logging.getLogger("megatron").setLevel(logging.ERROR)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)  # Megatron's writes to stdout, which is for results


def build_model(args: Namespace) -> Any:
    """Megatron's model of this rank's pipeline stage, with initial weights, in evaluation mode."""
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
    with quiet():
        iteration, _ = load_checkpoint([model], None, None)
    return int(iteration)


def load_model(source: Source, args: Namespace) -> InferenceModel:
    """Start Megatron, and load a checkpoint.

    Args:
        source: of `find_checkpoint`.
        args: of `checked_args`.
    """
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
        return eod_of(self.tokenizer)

    @property
    def num_replicas(self) -> int:
        """Data parallel ranks."""
        return int(parallel_state.get_data_parallel_world_size())

    @cached_property
    def token_keys(self) -> Callable[[Tensor], Tensor] | None:
        """Makes what the sparse layers read of the input ids; None if they read nothing."""
        sffn = sffn_config(self.args)
        return None if sffn is None else sffn.token_keys

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
            tokens: ids `[b, s]` from the start of the sequences, the same on all ranks of a
                replica.
            start: position of the first of them that is run; those before it are in the cache.
            labels: ids `[b, s]`, for losses.
            cache: keys and values of the tokens before `start`, to which those of the other tokens
                are added.

        Returns:
            On the last stage, the losses `[b, s]` with labels, and the logits `[b, s, V]` without
            them, `[b, 1, V]` of the last token with a cache; None on other stages.
        """
        group = parallel_state.get_pipeline_model_parallel_group()
        stage, num_stages = group.rank(), group.size()
        device = torch.cuda.current_device()
        tokens = tokens.to(device)
        # N-grams have ids from before `start`.
        token_keys = None if self.token_keys is None else self.token_keys(tokens)[:, start:]
        tokens = tokens[:, start:]
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
                padding_mask=token_keys,
            )
            if cache is not None:
                cache.increment_sequence_len_offset(tokens.shape[1])
            if stage < num_stages - 1:
                send_to_next_pipeline_rank(output.contiguous(), group)
                return None
        return output

    def score(
        self, tokens: Tensor, labels: Tensor, *, greedy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Loss of every label, on every rank; replicas share the work.

        Args:
            tokens: ids `[b, s]`, the same on all ranks.
            labels: ids `[b, s]`, the token that follows each.
            greedy: also say which labels are the likeliest token. All logits are in memory then,
                while the loss alone is computed from a part of the vocabulary on each TP rank.

        Returns:
            Losses in nats, `[b, s]` in fp32 on the CPU, and with `greedy` a mask `[b, s]`.
        """
        replicas = parallel_state.get_data_parallel_group()
        share = -(-len(tokens) // replicas.size())
        # All replicas run a batch of one size, since expert parallel ranks wait for each other.
        mine = torch.arange(replicas.rank() * share, (replicas.rank() + 1) * share) % len(tokens)
        output = self.forward(tokens[mine], labels=None if greedy else labels[mine])
        stages = parallel_state.get_pipeline_model_parallel_group()
        scores = torch.empty(2, share, tokens.shape[1], device=torch.cuda.current_device())
        if output is not None:
            scores[0], scores[1] = (
                self._loss_and_hits(output, labels[mine]) if greedy else (output, 0)
            )
        if stages.size() > 1:
            last = parallel_state.get_pipeline_model_parallel_last_rank()
            torch.distributed.broadcast(scores, src=last, group=stages)
        parts = [torch.empty_like(scores) for _ in range(replicas.size())]
        torch.distributed.all_gather(parts, scores, group=replicas)
        losses, hits = torch.cat(parts, dim=1)[:, : len(tokens)].cpu()
        return losses, hits.bool() if greedy else None

    def _loss_and_hits(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Losses `[b, s]`, and 1 where a label `[b, s]` has the largest of its logits."""
        labels = labels.to(logits.device)
        losses = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), labels.flatten(), reduction="none"
        ).view(labels.shape)
        # The rows of the embedding behind the vocabulary are padding.
        return losses, (logits[..., : self.vocab_size].argmax(dim=-1) == labels).float()


def is_output_rank() -> bool:
    """True if this rank prints and writes the results."""
    return os.environ.get("RANK", "0") == "0"


def finish() -> None:
    """End Megatron in this process, which can start it again with another model."""
    if torch.distributed.is_initialized():
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
    destroy_num_microbatches_calculator()
    destroy_rerun_state_machine()
    destroy_global_vars()
