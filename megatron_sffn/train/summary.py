"""Collects the results of a run, and writes `summary.json` when it ends.

Inputs: the losses of each evaluation (`evaluations.py`), the time of each training step, and the
layers' counters (`routing_metrics.py`). Outputs: files in the run's folder, beside Megatron's
checkpoints and TensorBoard events.

Design notes: the entry point creates one `RunSummary` and passes its methods to Megatron as hooks;
nothing is kept in module state.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import resource
import statistics
import time
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_sffn.accounting import ModelShape, count_parameters, flops_per_token
from megatron_sffn.nn.layer import sparse_layers
from megatron_sffn.patches.cpu import is_host
from megatron_sffn.train.evaluations import Evaluations
from megatron_sffn.train.progress_line import ProgressLine
from megatron_sffn.train.routing_metrics import RoutingMetrics
from megatron_sffn.train.routing_trace import RoutingTracer
from megatron_sffn.train.run_description import describe_run
from megatron_sffn.utils.atomic_files import atomic_write_text


@dataclass
class RunSummary:
    """Collects the results that Megatron does not return.

    Args:
        args: Megatron's namespace.
        folder: the run's folder.
        tracer: records the blocks of every token of an evaluation; None without
            `--sffn-record-routing`.
        progress: shows the progress on a terminal; None to show none.
    """

    args: Namespace
    folder: Path
    tracer: RoutingTracer | None = None
    progress: ProgressLine | None = None
    evaluations: Evaluations = field(init=False)
    samples_per_second: list[float] = field(default_factory=list)
    sent_bytes_per_token: float | None = None
    peak_memory_bytes: int | None = None
    has_started: bool = False
    routing: RoutingMetrics = field(init=False)
    _step: tuple[int, int, float] | None = None
    _iteration: int | None = None
    _reports: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.evaluations = Evaluations(self.args, self.folder)
        self.routing = RoutingMetrics(self.args, self.folder)

    def before_forward(self, training: bool) -> None:
        """Time the training steps; called before the forward pass of each microbatch."""
        self.has_started = True
        if self.progress is not None:
            self.progress.before_forward(training=training)
        if not training:
            self._step = None
            return
        now, iteration = time.perf_counter(), self.args.curr_iteration
        if self._step is not None and self._step[0] == iteration:
            return
        samples = self.args.consumed_train_samples
        if self._step is not None:
            _, samples_before, started = self._step
            # Samples are counted, since the batch size may change from step to step.
            self.samples_per_second.append((samples - samples_before) / (now - started))
        self._step = (iteration, samples, now)
        self._reports.clear()

    def after_step(self, model: list[torch.nn.Module], num_microbatches: int) -> None:
        """Called on every rank when all microbatches of a training step have run.

        Args:
            model: this rank's model chunks.
            num_microbatches: microbatches of the step on this rank.
        """
        self._iteration = self.args.curr_iteration + 1
        if self.args.num_experts is not None:
            self.routing.after_step(model, num_microbatches)
        if self.progress is not None:
            self.progress.after_step(self.iteration, self.samples_per_second)

    def add_training_loss(self, report: torch.Tensor) -> None:
        """Note the loss of a microbatch of training, on the last stage.

        Args:
            report: `[2]`, the summed loss and the number of tokens in it.
        """
        self._reports.append(report)

    def training_loss(self) -> float | None:
        """The loss of the last step, from all ranks; None if none was taken. A collective."""
        total = torch.zeros(2, dtype=torch.float64, device=torch.cuda.current_device())
        for report in self._reports:
            total += report
        torch.distributed.all_reduce(total)
        loss, tokens = total.tolist()
        return loss / tokens if tokens else None

    def before_save(self, model: list[torch.nn.Module], iteration: int) -> None:
        """Called on every rank before a checkpoint is written.

        Args:
            model: this rank's model chunks.
            iteration: steps that the model was trained.
        """
        if self.args.num_experts is not None:
            self.routing.before_save(model, iteration)

    @property
    def iteration(self) -> int:
        """Steps that the model was trained; before the first, those of the loaded checkpoint."""
        return int(self.args.iteration if self._iteration is None else self._iteration)

    def after_evaluation(self, model: list[torch.nn.Module]) -> None:
        """Called on every rank when a data set was evaluated."""
        earlier_iterations = [earlier.iteration for earlier in self.evaluations.validations]
        evaluation = self.evaluations.end_set()
        if not evaluation.is_finished:
            return
        if self.progress is not None:
            self.progress.after_evaluation(evaluation)
        if self.args.num_experts is not None:
            self.sent_bytes_per_token = sent_bytes_per_token(model)
            # routing.jsonl has the first evaluation of the validation set at each step.
            repeated = evaluation.is_test or evaluation.iteration in earlier_iterations
            self.routing.after_evaluation(model, evaluation.iteration, repeated=repeated)
        if self.tracer is not None:
            self.tracer.save()
            # The trace is of the validation set; an evaluation of the test set is not needed.
            self.args.do_test = False

    def write_summary(self, shape: ModelShape) -> Path | None:
        """Write `summary.json` on rank 0 when the run has ended; returns its path there."""
        self.peak_memory_bytes = _peak_memory_bytes()
        if torch.distributed.get_rank() != 0:
            return None
        path = self.folder / "summary.json"
        atomic_write_text(path, json.dumps(self.summary(shape), indent=2) + "\n")
        return path

    def summary(self, shape: ModelShape) -> dict[str, Any]:
        """The content of `summary.json`."""
        args = self.args
        losses = self.evaluations.summary()
        loss = losses["validation_loss"]
        parameters = count_parameters(shape)
        return {
            "router": args.sffn_router,
            "block_size": shape.sffn.block_size if shape.sffn else None,
            "expansion": shape.sffn.expansion if shape.sffn else None,
            "active_cells": shape.sffn.active_cells if shape.sffn else args.ffn_hidden_size,
            "num_blocks": shape.sffn.num_blocks if shape.sffn else None,
            "num_active_blocks": shape.sffn.num_active_blocks if shape.sffn else None,
            "iterations": self.iteration,
            "tokens": args.consumed_train_samples * args.seq_length,
            **losses,
            "validation_perplexity": None if loss is None else math.exp(min(loss, 700)),
            "parameters_total": parameters.total,
            "parameters_active": parameters.active,
            "flops_per_token": flops_per_token(shape).total,
            "sent_bytes_per_token": self.sent_bytes_per_token,
            "tokens_per_second": (
                args.seq_length * statistics.median(self.samples_per_second)
                if self.samples_per_second
                else None
            ),
            "peak_memory_bytes": self.peak_memory_bytes,
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
    """Version of an installed package; None for a clone that is imported without installation."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _peak_memory_bytes() -> int:
    """The most memory that a rank has held: of its GPU, or of its process on a CPU."""
    if is_host():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    else:
        peak = torch.cuda.max_memory_allocated()
    most = torch.tensor([peak], device=torch.cuda.current_device())
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    return int(most)


def sent_bytes_per_token(model: list[torch.nn.Module]) -> float | None:
    """Bytes sent per token and sparse layer since the last call.

    Returns:
        The mean over all layers and ranks; None with Megatron's dispatcher, which does not count.
    """
    counts = [layer.traffic.take() for chunk in model for layer in sparse_layers(chunk)]
    total = torch.tensor(counts, dtype=torch.float64).view(-1, 2).sum(dim=0)
    total = total.to(torch.cuda.current_device())
    torch.distributed.all_reduce(total)
    tokens, sent = total.tolist()
    return sent / tokens if tokens else None
