"""Logs how every sparse layer routes: `routing.jsonl`, TensorBoard, W&B.

Inputs: the counters of the layers (`nn/routing_counters.py`, `nn/load_balancing.py`), once per step
and once per evaluation. Outputs: a line per layer at every `--log-interval`, and one per layer at
every evaluation with the tokens of each block; scalars `routing/NAME/layer_N`, and `routing/NAME`,
their mean over layers.

Design notes:
- A line sums over all `steps` since the last line, not over a sample of them.
  Between two lines a step only counts; a line costs one all-reduce of one tensor.
- The plain sum over all ranks equals the count of a run on one rank: tensor-parallel ranks hold
  different tokens (sparse layers require sequence parallelism), so do data- and context-parallel
  ranks, and pipeline stages hold different layers.
- Checkpoints do not contain the sums. So a line is also written wherever a run may end or resume:
  at a save, at `--exit-interval`, and at the last step.
- On resume, the lines of steps that are taken again are dropped.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer
from torch import Tensor

from megatron_sffn.nn.layer import sparse_layers
from megatron_sffn.nn.layer_pattern import count_layers
from megatron_sffn.nn.load_balancing import BALANCE_LOSSES
from megatron_sffn.nn.routing_counters import SUMS, load_entropy
from megatron_sffn.utils.atomic_files import append_records, replace_records

TRAINING, EVALUATION = "training", "evaluation"
"""Values of `phase` in a line."""

LOSSES = (*BALANCE_LOSSES.values(), "z_loss", "entropy_loss", "l1_loss")
"""Names of the auxiliary losses: unweighted means over microbatches."""

NUMBERS = (
    "load_entropy",
    "dead_share",
    "load_p50",
    "load_p95",
    "load_max",
    "gate_mean",
    "gate_std",
    "negative_share",
    "empty_share",
)
"""Names of the scalars that TensorBoard and W&B get beside the losses."""


@dataclass
class RoutingMetrics:
    """Lines and scalars of one run.

    Args:
        args: Megatron's namespace.
        folder: the run's folder.
    """

    args: Namespace
    folder: Path
    _steps: int = 0
    _microbatches: int = 0
    _started: bool = False

    @property
    def path(self) -> Path:
        """The file with the lines."""
        return self.folder / "routing.jsonl"

    def after_step(self, model: list[torch.nn.Module], num_microbatches: int) -> None:
        """Called on all ranks when the microbatches of a step have run.

        Args:
            model: this rank's model chunks.
            num_microbatches: microbatches of the step on this rank.
        """
        iteration = self.args.curr_iteration + 1
        self._steps += 1
        self._microbatches += num_microbatches
        if self._is_due(iteration):
            self._write_steps(model, iteration)

    def before_save(self, model: list[torch.nn.Module], iteration: int) -> None:
        """Called on all ranks before a checkpoint is written, which may happen at any step.

        Args:
            model: this rank's model chunks.
            iteration: steps that the model was trained.
        """
        if self._steps:
            self._write_steps(model, iteration)

    def _write_steps(self, model: list[torch.nn.Module], iteration: int) -> None:
        """Write lines about the steps since the last lines."""
        table = layer_sums(model, self.args, training=True)
        # Losses are means over data-parallel ranks and microbatches.
        table[:, -len(LOSSES) :] /= self.args.data_parallel_size * self._microbatches
        numbers = layer_numbers(table, self.args.num_experts)
        common = {"iteration": iteration, "phase": TRAINING, "steps": self._steps}
        earlier_steps = iteration - self._steps
        self._write([common | numbers[layer] for layer in sorted(numbers)], earlier_steps)
        _log_scalars(numbers, iteration)
        self._steps = self._microbatches = 0

    def after_evaluation(
        self, model: list[torch.nn.Module], iteration: int, *, repeated: bool
    ) -> None:
        """Called on all ranks when an evaluation has ended.

        Args:
            model: this rank's model chunks.
            iteration: steps that the model was trained.
            repeated: True if the file has an evaluation of this step already; it keeps the first.
        """
        table = layer_sums(model, self.args, training=False)
        if repeated:
            return
        numbers = layer_numbers(table, self.args.num_experts)
        loads = table[:, : self.args.num_experts].long().tolist()
        common = {"iteration": iteration, "phase": EVALUATION}
        records = [
            common | numbers[layer] | {"tokens_per_block": loads[layer - 1]}
            for layer in sorted(numbers)
        ]
        self._write(records, iteration)

    def _is_due(self, iteration: int) -> bool:
        """True if lines are written after this step."""
        args = self.args
        intervals = [args.log_interval, args.train_iters, args.exit_interval]
        if args.save:
            intervals.append(args.save_interval)
        return any(interval and iteration % interval == 0 for interval in intervals)

    def _write(self, records: list[dict[str, Any]], earlier_steps: int) -> None:
        """Add lines; the first call drops the lines of steps that this process takes again.

        Args:
            records: lines of one phase of one iteration.
            earlier_steps: steps before those of the records.
        """
        if torch.distributed.get_rank() != 0:
            return
        if self._started:
            append_records(self.path, records)
            return
        self._started = True
        skip_train = self.args.skip_train

        def keep(old: dict[str, Any]) -> bool:
            iteration, phase = old["iteration"], old.get("phase", EVALUATION)
            if (iteration, phase) in {(new["iteration"], new["phase"]) for new in records}:
                return False
            # With --skip-train no step is taken again.
            return bool(skip_train or iteration <= earlier_steps)

        replace_records(self.path, keep, records)


@torch.no_grad()
def layer_sums(model: list[torch.nn.Module], args: Namespace, *, training: bool) -> Tensor:
    """The counters of all layers since the last call, summed over all ranks.

    Args:
        model: this rank's model chunks.
        args: Megatron's namespace, with the numbers of layers and blocks.
        training: True for the counters of steps, False for those of evaluations, which have no
            losses.

    Returns:
        `[layers, B + len(SUMS) + len(LOSSES)]` float64 on the CPU: the load of each block, `SUMS`
        and `LOSSES`; zero rows for dense layers.
    """
    blocks, width = args.num_experts, args.num_experts + len(SUMS) + len(LOSSES)
    device = torch.cuda.current_device()
    num_layers = count_layers(args.num_layers, args.mtp_num_layers, args.hybrid_layer_pattern)
    table = torch.zeros(num_layers, width, dtype=torch.float64, device=device)
    for layer in (layer for chunk in model for layer in sparse_layers(chunk)):
        row = table[layer.layer_number - 1]
        counters = (layer.trained if training else layer.evaluated).take()
        row[:blocks] += counters.load
        row[blocks : blocks + len(SUMS)] += counters.sums
        if training and hasattr(layer.router, "balance"):
            for name, value in layer.router.balance.take_values().items():
                row[blocks + len(SUMS) + LOSSES.index(name)] += value.sum()
    torch.distributed.all_reduce(table)
    return table.cpu()


def layer_numbers(table: Tensor, num_blocks: int) -> dict[int, dict[str, Any]]:
    """Layer, counted from 1 -> its metrics; layers that saw no tokens are left out.

    Args:
        table: from `layer_sums`, with the losses as means.
        num_blocks: B.
    """
    columns = table.split((num_blocks, len(SUMS), len(LOSSES)), dim=1)
    numbers = {}
    for layer, (load, sums, losses) in enumerate(zip(*columns, strict=True), start=1):
        sum_of = dict(zip(SUMS, sums.tolist(), strict=True))
        if sum_of["tokens"]:
            metrics = describe(load, sum_of)
            # A loss of exactly 0 is one that is not in use.
            metrics |= {name: v for name, v in zip(LOSSES, losses.tolist(), strict=True) if v}
            numbers[layer] = {"layer": layer} | {name: _short(v) for name, v in metrics.items()}
    return numbers


def describe(load: Tensor, sums: dict[str, float]) -> dict[str, float | int | None]:
    """The routing metrics of a layer.

    Args:
        load: `[B]`, the tokens of each block.
        sums: `SUMS` by name.

    Returns:
        `tokens`; `load_entropy`, 1 for an even load; `dead_blocks` and their share; percentiles of
        the load in multiples of an even load; mean and standard deviation of the chosen gates and
        the share of chosen scores below zero, None if the router has neither; the share of places
        that stayed empty.
    """
    chosen = float(load.sum())
    places = chosen + sums["empty_places"]
    load = load.double()
    quantiles = torch.quantile(load, load.new_tensor([0.5, 0.95, 1.0])) * len(load)
    p50, p95, maximum = (quantiles / max(chosen, 1)).tolist()
    dead = int((load == 0).sum())
    mean = deviation = negative = None
    if sums["squared_gates"]:
        mean = sums["gates"] / chosen
        deviation = max(sums["squared_gates"] / chosen - mean**2, 0.0) ** 0.5
    if sums["scores"]:
        negative = sums["negative_scores"] / sums["scores"]
    return {
        "tokens": int(sums["tokens"]),
        "load_entropy": load_entropy(load),
        "dead_blocks": dead,
        "dead_share": dead / len(load),
        "load_p50": p50,
        "load_p95": p95,
        "load_max": maximum,
        "gate_mean": mean,
        "gate_std": deviation,
        "negative_share": negative,
        "empty_share": sums["empty_places"] / places if places else 0.0,
    }


def _log_scalars(numbers: dict[int, dict[str, Any]], iteration: int) -> None:
    """Log to TensorBoard and W&B, on the rank that has Megatron's writers."""
    tensorboard, wandb = get_tensorboard_writer(), get_wandb_writer()
    if tensorboard is None and wandb is None:
        return
    value_of = dict(scalars(numbers))
    if tensorboard is not None:
        for name, value in value_of.items():
            tensorboard.add_scalar(name, value, iteration)
    if wandb is not None:
        wandb.log(value_of, iteration)


def scalars(numbers: dict[int, dict[str, Any]]) -> Iterable[tuple[str, float]]:
    """Names and values to log: those of each layer, and their means over layers.

    Args:
        numbers: from `layer_numbers`.
    """
    for name in (*NUMBERS, *LOSSES):
        values = {layer: metrics.get(name) for layer, metrics in numbers.items()}
        known = {layer: value for layer, value in values.items() if value is not None}
        if known:
            yield f"routing/{name}", sum(known.values()) / len(known)
        for layer, value in known.items():
            yield f"routing/{name}/layer_{layer}", value


def _short(value: float | int | None) -> float | int | None:
    """A float with six significant digits, to keep lines short."""
    return float(f"{value:.6g}") if isinstance(value, float) else value
