"""How every sparse layer routes, while it trains: `routing.jsonl`, TensorBoard, W&B.

Enters: the counters of the layers (`statistics.py`, `balance.py`), once per step and once per
evaluation. Leaves: a line per layer at every `--log-interval`, and at every evaluation one with the
tokens of each block; scalars `routing/NAME/layer_N` and their mean over layers, `routing/NAME`.

Choices
- A line sums over all steps since the last one, not over a sample of them: `steps` says how many.
  Between two lines a step costs the counting alone; a line costs one all-reduce of one tensor.
- Plain sums over all ranks are those of one rank: with sparse layers, tensor-parallel ranks hold
  different tokens (`layout.py` asks for sequence parallelism), as data- and context-parallel ones
  do, and pipeline stages hold different layers.
- Sums have no place in a checkpoint. So there is a line wherever a run may end or go on, too: where
  it saves, at `--exit-interval`, at its last step.
- A run that goes on first drops the lines of steps that it takes again.
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
from megatron_sffn.nn.load_balancing import BALANCE_LOSSES
from megatron_sffn.nn.routing_counters import SUMS, load_entropy
from megatron_sffn.utils.atomic_files import append_records, replace_records

TRAINING, EVALUATION = "training", "evaluation"
"""Values of `phase` in a line."""

LOSSES = (*BALANCE_LOSSES.values(), "z_loss", "entropy_loss")
"""Names of the balance losses: unweighted, a mean over microbatches."""

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
"""Names of what is drawn in TensorBoard beside the losses."""


@dataclass
class RoutingLog:
    """Lines and scalars of one run.

    Args:
        args: Megatron's namespace.
        folder: of the run.
    """

    args: Namespace
    folder: Path
    _steps: int = 0
    _microbatches: int = 0
    _started: bool = False

    @property
    def path(self) -> Path:
        """Of the lines."""
        return self.folder / "routing.jsonl"

    def after_step(self, model: list[torch.nn.Module], num_microbatches: int) -> None:
        """Called on all ranks when the microbatches of a step have run.

        Args:
            model: this rank's chunks.
            num_microbatches: of the step on this rank.
        """
        iteration = self.args.curr_iteration + 1
        self._steps += 1
        self._microbatches += num_microbatches
        if self._is_due(iteration):
            self._write_steps(model, iteration)

    def before_save(self, model: list[torch.nn.Module], iteration: int) -> None:
        """Called on all ranks before a checkpoint is written, which may be at any step.

        Args:
            model: this rank's chunks.
            iteration: steps that the model was trained.
        """
        if self._steps:
            self._write_steps(model, iteration)

    def _write_steps(self, model: list[torch.nn.Module], iteration: int) -> None:
        """Lines about the steps since the last ones."""
        table = layer_sums(model, self.args, training=True)
        # Losses are means over data-parallel ranks and microbatches.
        table[:, -len(LOSSES) :] /= self.args.data_parallel_size * self._microbatches
        numbers = layer_numbers(table, self.args.num_experts)
        head = {"iteration": iteration, "phase": TRAINING, "steps": self._steps}
        before = iteration - self._steps
        self._write([head | numbers[layer] for layer in sorted(numbers)], before)
        _draw(numbers, iteration)
        self._steps = self._microbatches = 0

    def after_evaluation(
        self, model: list[torch.nn.Module], iteration: int, *, again: bool
    ) -> None:
        """Called on all ranks when an evaluation has ended.

        Args:
            model: this rank's chunks.
            iteration: steps that the model was trained.
            again: whether it is not the first at this step; the file holds the first.
        """
        table = layer_sums(model, self.args, training=False)
        if again:
            return
        numbers = layer_numbers(table, self.args.num_experts)
        loads = table[:, : self.args.num_experts].long().tolist()
        head = {"iteration": iteration, "phase": EVALUATION}
        records = [
            head | numbers[layer] | {"tokens_per_block": loads[layer - 1]}
            for layer in sorted(numbers)
        ]
        self._write(records, iteration)

    def _is_due(self, iteration: int) -> bool:
        """Whether a line follows this step."""
        args = self.args
        ends = [args.log_interval, args.train_iters, args.exit_interval]
        if args.save:
            ends.append(args.save_interval)
        return any(interval and iteration % interval == 0 for interval in ends)

    def _write(self, records: list[dict[str, Any]], done: int) -> None:
        """Add lines; the first time, drop what this process does again.

        Args:
            records: of one phase of one iteration.
            done: steps that came before those of the records.
        """
        if torch.distributed.get_rank() != 0:
            return
        if self._started:
            append_records(self.path, records)
            return
        self._started = True
        skip_train = self.args.skip_train

        def keep(former: dict[str, Any]) -> bool:
            iteration, phase = former["iteration"], former.get("phase", EVALUATION)
            if (iteration, phase) in {(one["iteration"], one["phase"]) for one in records}:
                return False
            # An evaluation alone changes nothing about the steps that may have followed.
            return bool(skip_train or iteration <= done)

        replace_records(self.path, keep, records)


@torch.no_grad()
def layer_sums(model: list[torch.nn.Module], args: Namespace, *, training: bool) -> Tensor:
    """What the layers counted since the last call, summed over all ranks.

    Args:
        model: this rank's chunks.
        args: with the numbers of layers and blocks.
        training: of steps, or of evaluations, which have no losses.

    Returns:
        `[layers, B + 6 + 5]` float64 on the CPU: the load of each block, `SUMS` and `LOSSES`; zero
        rows for dense layers.
    """
    blocks, width = args.num_experts, args.num_experts + len(SUMS) + len(LOSSES)
    device = torch.cuda.current_device()
    table = torch.zeros(args.num_layers, width, dtype=torch.float64, device=device)
    for layer in (layer for chunk in model for layer in sparse_layers(chunk)):
        row = table[layer.layer_number - 1]
        taken = (layer.trained if training else layer.evaluated).take()
        row[:blocks] += taken.load
        row[blocks : blocks + len(SUMS)] += taken.sums
        if training and hasattr(layer.router, "balance"):
            for name, value in layer.router.balance.take_values().items():
                row[blocks + len(SUMS) + LOSSES.index(name)] += value.sum()
    torch.distributed.all_reduce(table)
    return table.cpu()


def layer_numbers(table: Tensor, num_blocks: int) -> dict[int, dict[str, Any]]:
    """The numbers of each layer that saw tokens, counted from 1.

    Args:
        table: from `layer_sums`, with the losses as means.
        num_blocks: B.
    """
    parts = table.split((num_blocks, len(SUMS), len(LOSSES)), dim=1)
    numbers = {}
    for layer, (load, sums, losses) in enumerate(zip(*parts, strict=True), start=1):
        named = dict(zip(SUMS, sums.tolist(), strict=True))
        if named["tokens"]:
            found = describe(load, named)
            # A loss that is in use is not zero.
            found |= {name: v for name, v in zip(LOSSES, losses.tolist(), strict=True) if v}
            numbers[layer] = {"layer": layer} | {name: _short(v) for name, v in found.items()}
    return numbers


def describe(load: Tensor, sums: dict[str, float]) -> dict[str, float | int | None]:
    """A layer's routing in numbers.

    Args:
        load: `[B]` tokens of each block.
        sums: `SUMS` by name.

    Returns:
        `tokens`; `load_entropy`, 1 when even; `dead_blocks` and their share; percentiles of the
        load in multiples of an even one; mean and deviation of chosen gates and the share of chosen
        scores below zero, None where the router has none; the share of places that stayed empty.
    """
    chosen = float(load.sum())
    places = chosen + sums["empty_places"]
    load = load.double()
    quantiles = torch.quantile(load, load.new_tensor([0.5, 0.95, 1.0])) * len(load)
    p50, p95, most = (quantiles / max(chosen, 1)).tolist()
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
        "load_max": most,
        "gate_mean": mean,
        "gate_std": deviation,
        "negative_share": negative,
        "empty_share": sums["empty_places"] / places if places else 0.0,
    }


def _draw(numbers: dict[int, dict[str, Any]], iteration: int) -> None:
    """Scalars for TensorBoard and W&B, on the rank that has Megatron's writers."""
    tensorboard, wandb = get_tensorboard_writer(), get_wandb_writer()
    if tensorboard is None and wandb is None:
        return
    found = dict(scalars(numbers))
    if tensorboard is not None:
        for name, value in found.items():
            tensorboard.add_scalar(name, value, iteration)
    if wandb is not None:
        wandb.log(found, iteration)


def scalars(numbers: dict[int, dict[str, Any]]) -> Iterable[tuple[str, float]]:
    """Names and values to draw: of each layer, and their means.

    Args:
        numbers: from `layer_numbers`.
    """
    for name in (*NUMBERS, *LOSSES):
        values = {layer: found.get(name) for layer, found in numbers.items()}
        known = {layer: value for layer, value in values.items() if value is not None}
        if known:
            yield f"routing/{name}", sum(known.values()) / len(known)
        for layer, value in known.items():
            yield f"routing/{name}/layer_{layer}", value


def _short(value: float | int | None) -> float | int | None:
    """Six digits are enough for a line."""
    return float(f"{value:.6g}") if isinstance(value, float) else value
