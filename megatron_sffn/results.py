"""What a run leaves: `summary.json`, and through `routing_log.py` how its layers route.

Enters: losses of each evaluation, the time of each training step, the layers' counters. Leaves: two
files in the run's folder, beside Megatron's checkpoints and TensorBoard events.

Choice: one `Recorder` object, made by the entry point and passed to Megatron as its hooks; nothing
is kept in module state.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import statistics
import time
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_sffn.accounting import ModelShape, count_parameters, flops_per_token
from megatron_sffn.layer import sparse_layers
from megatron_sffn.recording import RoutingRecorder
from megatron_sffn.routing_log import RoutingLog
from megatron_sffn.run_description import describe_run
from megatron_sffn.run_files import write_whole


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Loss of one pass over evaluation data."""

    iteration: int
    loss: float


@dataclass
class Recorder:
    """Collects what Megatron does not return.

    Args:
        args: Megatron's namespace.
        folder: of the run.
        blocks: recorder of the blocks of every token of an evaluation, where that is asked for.
    """

    args: Namespace
    folder: Path
    blocks: RoutingRecorder | None = None
    evaluations: list[Evaluation] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    sent_bytes_per_token: float | None = None
    routing: RoutingLog = field(init=False)
    _loss: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))
    _step: tuple[int, float] | None = None

    def __post_init__(self) -> None:
        self.routing = RoutingLog(self.args, self.folder)

    def before_forward(self, training: bool) -> None:
        """Time the training steps; called before each microbatch's forward pass."""
        if not training:
            self._step = None
            return
        now, iteration = time.perf_counter(), self.args.curr_iteration
        if self._step is not None and self._step[0] != iteration:
            self.step_seconds.append(now - self._step[1])
        if self._step is None or self._step[0] != iteration:
            self._step = (iteration, now)

    def after_step(self, model: list[torch.nn.Module], num_microbatches: int) -> None:
        """Called on every rank when all microbatches of a training step have run.

        Args:
            model: this rank's chunks.
            num_microbatches: of the step on this rank.
        """
        if self.args.num_experts is not None:
            self.routing.after_step(model, num_microbatches)

    def before_save(self, model: list[torch.nn.Module], iteration: int) -> None:
        """Called on every rank before a checkpoint is written.

        Args:
            model: this rank's chunks.
            iteration: steps that the model was trained.
        """
        if self.args.num_experts is not None:
            self.routing.before_save(model, iteration)

    def add_evaluated(self, loss_and_tokens: Tensor) -> None:
        """Add an evaluated microbatch's summed loss and number of tokens, `[2]`."""
        self._loss += loss_and_tokens.detach().double().cpu()

    @property
    def iteration(self) -> int:
        """Steps that the model was trained."""
        return int(self.args.consumed_train_samples // self.args.global_batch_size)

    def after_evaluation(self, model: list[torch.nn.Module]) -> None:
        """Called on every rank when an evaluation ends."""
        # Ranks of one TP group hold the same sums, ranks of other stages none: the quotient stays.
        total = self._loss.clone().to(torch.cuda.current_device())
        torch.distributed.all_reduce(total)
        self._loss.zero_()
        iteration = self.iteration
        loss, tokens = total.tolist()
        # A second evaluation at the same step is of the test set; the file shows the validation.
        again = any(former.iteration == iteration for former in self.evaluations)
        self.evaluations.append(Evaluation(iteration=iteration, loss=loss / max(tokens, 1)))
        if self.args.num_experts is not None:
            self.sent_bytes_per_token = sent_bytes_per_token(model)
            self.routing.after_evaluation(model, iteration, again=again)
        if self.blocks is not None:
            self.blocks.save()
            # Nothing else was asked for.
            self.args.do_test = False

    def write_summary(self, shape: ModelShape) -> Path | None:
        """Write `summary.json` on rank 0 when the run has ended; returns its path there."""
        if torch.distributed.get_rank() != 0:
            return None
        path = self.folder / "summary.json"
        write_whole(path, json.dumps(self.summary(shape), indent=2) + "\n")
        return path

    def summary(self, shape: ModelShape) -> dict[str, Any]:
        """The run in numbers."""
        args = self.args
        # Megatron evaluates the validation set, and after it the test set if there is one.
        test = self.evaluations[-1].loss if args.do_test and self.evaluations else None
        validated = self.evaluations[:-1] if args.do_test else self.evaluations
        loss = validated[-1].loss if validated else None
        # The last iteration is evaluated twice if --eval-interval divides it: the last word counts.
        curve = {one.iteration: one.loss for one in validated}
        parameters = count_parameters(shape)
        tokens_per_step = args.global_batch_size * args.seq_length
        return {
            "router": args.sffn_router,
            "block_size": shape.sffn.block_size if shape.sffn else None,
            "expansion": shape.sffn.expansion if shape.sffn else None,
            "active_cells": shape.sffn.active_cells if shape.sffn else args.ffn_hidden_size,
            "num_blocks": shape.sffn.num_blocks if shape.sffn else None,
            "num_active_blocks": shape.sffn.num_active_blocks if shape.sffn else None,
            "iterations": args.consumed_train_samples // args.global_batch_size,
            "tokens": args.consumed_train_samples * args.seq_length,
            "validation_loss": loss,
            "validation_perplexity": None if loss is None else math.exp(min(loss, 700)),
            "test_loss": test,
            "validation_curve": [list(point) for point in curve.items()],
            "parameters_total": parameters.total,
            "parameters_active": parameters.active,
            "flops_per_token": flops_per_token(shape).total,
            "sent_bytes_per_token": self.sent_bytes_per_token,
            "tokens_per_second": (
                tokens_per_step / statistics.median(self.step_seconds)
                if self.step_seconds
                else None
            ),
            "layout": {
                "world_size": args.world_size,
                "tensor": args.tensor_model_parallel_size,
                "pipeline": args.pipeline_model_parallel_size,
                "expert": args.expert_model_parallel_size,
                "expert_tensor": args.expert_tensor_parallel_size,
                "context": args.context_parallel_size,
                "data": args.data_parallel_size,
            },
            "versions": {
                "python": platform.python_version(),
                **{
                    package: _version_of(package)
                    for package in ("megatron-sffn", "megatron-core", "torch")
                },
            },
            "seed": args.seed,
            **describe_run(args, shape),
        }


def _version_of(package: str) -> str | None:
    """Of an installed package; None for a clone that is imported where it lies."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def sent_bytes_per_token(model: list[torch.nn.Module]) -> float | None:
    """Bytes that a token cost in the exchange of one sparse layer since the last call.

    Returns:
        The mean over all layers and ranks; None where nobody counts, with Megatron's dispatcher.
    """
    counts = [layer.traffic.take() for chunk in model for layer in sparse_layers(chunk)]
    total = torch.tensor(counts, dtype=torch.float64).view(-1, 2).sum(dim=0)
    total = total.to(torch.cuda.current_device())
    torch.distributed.all_reduce(total)
    tokens, sent = total.tolist()
    return sent / tokens if tokens else None
