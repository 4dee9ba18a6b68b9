"""Checkpoints of untrained models and Megatron's logits for them, without a training run."""

from __future__ import annotations

import shlex
import sys
import warnings
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.models.gpt import GPTModelBuilder
from megatron.training.vocab_utils import calculate_padded_vocab_size
from torch import Tensor

from megatron_sffn.checkpoints.files import TRACKER, folder_to_load, iteration_folder
from megatron_sffn.flags.sffn_flags import sffn_config
from megatron_sffn.nn.routers import ROUTERS
from megatron_sffn.patches import cpu
from megatron_sffn.train.arguments import parse
from megatron_sffn.train.run import model_config
from tests.support.ranks import run_ranks

VOCAB, LENGTH, ITERATION = 96, 24, 3

MODEL = f"""
    --num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length {LENGTH}
    --max-position-embeddings 64 --position-embedding-type rope --disable-bias-linear
    --tokenizer-type NullTokenizer --vocab-size {VOCAB - 1} --make-vocab-size-divisible-by 32
    --micro-batch-size 1 --global-batch-size 1 --train-iters 1 --lr 1e-3 --mock-data
    --attention-dropout 0 --hidden-dropout 0 --init-method-std 0.2 --ffn-hidden-size 16
    --sffn-block-size 4 --sffn-expansion 4 --sffn-layers 1
"""
"""A dense layer, then a sparse one of 64 cells, of which a token uses 16."""


WITH_BIASES = "WITH-BIASES"


def flags_of(router: str) -> str:
    """Flags of a router that is defined for the sizes of `MODEL`."""
    numbers = ROUTERS[router].test_numbers
    # Of a training run with wider layers: `--sffn-key-rank 16` and the like fit here too.
    flags = f"--sffn-router {router} {numbers.flags.replace('--sffn-relu', '')}"
    if numbers.single_cells:
        flags += " --sffn-block-size 1"
    if numbers.square_blocks:
        flags += " --sffn-expansion 4"
    return flags


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A checkpoint, and what Megatron's model computes with it.

    Args:
        load: the folder of the run.
        ids: `[2, LENGTH]`.
        logits: `[2, LENGTH, rows of the embedding]`.
    """

    load: Path
    ids: Tensor
    logits: Tensor


def save_models(folder: Path, flags: list[str]) -> list[Saved]:
    """Make a checkpoint for each of the flags that follow `MODEL`, on one rank.

    No flag undoes `--disable-bias-linear`, so `WITH_BIASES` in the flags takes it out of `MODEL`.
    """
    (saved,) = run_ranks(1, _save_models, folder, flags)
    return saved


def _save_models(folder: Path, flags: list[str]) -> list[Saved]:
    warnings.simplefilter("ignore")
    return [_save(folder / str(number), text) for number, text in enumerate(flags)]


def logits_of(load: Path, flags: str, ids: Tensor) -> Tensor:
    """Megatron's logits on one rank with the last checkpoint of a run.

    Args:
        load: folder of the run.
        flags: of the model and the tokenizer.
        ids: `[b, s]`.
    """
    return logits_of_all({load: (flags, ids)})[load]


def logits_of_all(models: Mapping[Path, tuple[str, Tensor]]) -> dict[Path, Tensor]:
    """The same for several runs: folder -> flags and ids."""

    def body() -> dict[Path, Tensor]:
        warnings.simplefilter("ignore")
        return {load: _logits_of(load, flags, ids) for load, (flags, ids) in models.items()}

    (logits,) = run_ranks(1, body)
    return logits


@torch.no_grad()
def _logits_of(load: Path, flags: str, ids: Tensor) -> Tensor:
    model = _build(_arguments(flags))
    folder = folder_to_load(load, None)
    loaded = dist_checkpointing.load(model.sharded_state_dict(), str(folder))
    model.load_state_dict(loaded, strict=False)
    return _forward(model, ids, flags)


def _forward(model: Any, ids: Tensor, flags: str) -> Tensor:
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    token_ids = ids if "rand-hash" in flags else None
    return model(ids, positions, None, padding_mask=token_ids).float()


def _build(args: Namespace) -> Any:
    """Megatron's model in evaluation mode."""
    config: Any = model_config(args, sffn_config(args))
    config.vocab_size = args.padded_vocab_size
    (model,) = GPTModelBuilder(config).build_distributed_models(
        ProcessGroupCollection.use_mpu_process_groups(),
        wrap_with_ddp=False,
        data_parallel_random_init=False,
    )
    return model.eval()


def _arguments(flags: str) -> Namespace:
    words = shlex.split(flags)
    if WITH_BIASES in words:
        words = [word for word in words if word not in (WITH_BIASES, "--disable-bias-linear")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pretrain", *words])
        patch.setenv("RANK", "0")
        patch.setenv("WORLD_SIZE", "1")
        args = parse(dict(cpu.HOST_FLAGS.values()))
    args.padded_vocab_size = calculate_padded_vocab_size(
        args.vocab_size, args.make_vocab_size_divisible_by, 1, False
    )
    return args


@torch.no_grad()
def _save(load: Path, flags: str) -> Saved:
    args = _arguments(f"{MODEL} {flags}")
    model = _build(args)
    draw = torch.Generator().manual_seed(5)
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            continue
        if tensor.dim() == 1 or not tensor.any():  # norms, biases, and what starts at zero
            tensor += torch.randn(tensor.shape, generator=draw) * 0.3
        if name.endswith("started"):
            tensor.copy_(torch.arange(len(tensor))[:, None] % 2)
    ids = torch.randint(VOCAB, (2, LENGTH), generator=draw)
    logits = _forward(model, ids, flags)
    target = iteration_folder(load, ITERATION)
    target.mkdir(parents=True)
    args.curr_iteration, args.consumed_train_samples = ITERATION, 7
    state = {**model.sharded_state_dict(), "args": args, "iteration": ITERATION}
    dist_checkpointing.save(state, str(target))
    (load / TRACKER).write_text(str(ITERATION))
    return Saved(load=load, ids=ids, logits=logits)
