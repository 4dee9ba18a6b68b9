"""Losses and scores that are NaN or infinite: noted on the device, looked at once a step.

Inputs: the loss of each microbatch, and the flag that each router keeps of its scores.
Outputs: the same `FloatingPointError` on all ranks, before the optimizer changes a weight, or at
the end of an evaluation; or what Megatron's own checks of the loss do.

Design notes:
- A rank that raises alone leaves the others waiting in a collective operation. So the flags of all
  layers are reduced over all ranks, in one small all-reduce, and every rank reads the same.
- Megatron's checks of the loss come after that look. They would end one rank, with a sentence that
  names no layer. They are called in the order of the microbatches, as if it were within them.
- With `--overlap-grad-reduce` and `--rerun-mode disabled` together, Megatron looks at gradients
  within the backward pass, before the end of the step, and ends the rank that has the NaN.
"""

from __future__ import annotations

from argparse import Namespace
from functools import partial

import torch
from megatron.core.rerun_state_machine import get_rerun_state_machine
from torch import Tensor

from megatron_sffn.nn.layer import sparse_layers

SPIKE = 10.0
"""A loss is a spike if it exceeds the largest so far by this factor; as in Megatron's own loss."""

CAUSE = "the hidden states or weights that they come from have diverged"


class NanCheck:
    """The losses of a step, and the look at all that may be NaN.

    Args:
        args: Megatron's namespace.
    """

    def __init__(self, args: Namespace) -> None:
        self.args = args
        self._losses: list[Tensor] = []

    def note_loss(self, loss: Tensor) -> None:
        """Keep the scalar loss of a microbatch until the step, or the evaluation, ends."""
        self._losses.append(loss.detach())

    def after_step(self, model: list[torch.nn.Module]) -> None:
        """Called on all ranks when the microbatches of a step have run, before the optimizer.

        Args:
            model: this rank's chunks.

        Raises:
            FloatingPointError: on all ranks, if scores of a layer were NaN or infinite on one of
                them; or if a loss was so in the first step of a process, which Megatron does not
                look at: weights that are NaN would be saved.
            RuntimeError: Megatron's, if a loss is so in a later step and `--rerun-mode` is
                disabled; otherwise Megatron runs the step again and decides then.
        """
        step = self.args.curr_iteration + 1
        first = not get_rerun_state_machine().first_iteration_complete
        loss = self._look(model, f"step {step}")
        if loss and first:
            raise FloatingPointError(
                f"the loss is {loss} in the first step, step {step}; the weights that were loaded, "
                "or the flags, do not work"
            )
        self._check_losses()

    def after_evaluation(self, model: list[torch.nn.Module], iteration: int) -> None:
        """Called on all ranks when an evaluation has ended.

        Args:
            model: this rank's chunks.
            iteration: steps that the model was trained.

        Raises:
            FloatingPointError: on all ranks, if scores or a loss were NaN or infinite on one.
        """
        where = f"evaluation after step {iteration}"
        if loss := self._look(model, where):
            raise FloatingPointError(
                f"the loss is {loss} in the {where}; the weights have diverged"
            )
        self._check_losses()

    def _look(self, model: list[torch.nn.Module], where: str) -> str:
        """Raise for scores; returns "nan" or "inf" for a loss that is, else "".

        The noted losses are on the host afterwards, so that the host waits for the device once.
        """
        flags = self._flags(model)
        numbers = torch.cat((flags, *(loss.reshape(1) for loss in self._losses))).tolist()
        *layers, loss = numbers[: len(flags)]
        self._losses = [torch.tensor(number) for number in numbers[len(flags) :]]
        for number, flag in enumerate(layers, start=1):
            if flag:
                raise FloatingPointError(
                    f"{where}, layer {number}, router {self.args.sffn_router}: scores are NaN or "
                    f"infinite; {CAUSE}"
                )
        return ("", "inf", "nan")[int(loss)]

    @torch.no_grad()
    def _flags(self, model: list[torch.nn.Module]) -> Tensor:
        """`[layers + 1]`, the largest of all ranks: 1 for a layer with bad scores; of the losses.

        The last is 2 if a loss is NaN, else 1 if one is infinite, and 0 if they are not checked.
        """
        device = torch.cuda.current_device()
        flags = torch.zeros(self.args.num_layers + 1, device=device)
        for layer in (layer for chunk in model for layer in sparse_layers(chunk)):
            flags[layer.layer_number - 1] += layer.router.score_flag
        flags = flags.isnan().float()
        if self._losses and self.args.check_for_nan_in_loss_and_grad:
            losses = torch.stack(self._losses)
            flags[-1] = losses.isnan().any().float() + (~losses.isfinite()).any().float()
        torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
        return flags

    def _check_losses(self) -> None:
        """Megatron's checks of the losses, which start again from none."""
        losses, self._losses = self._losses, []
        for loss in losses:
            check_loss(self.args, loss)


def check_loss(args: Namespace, loss: Tensor) -> None:
    """Megatron's checks of a microbatch's loss on this rank.

    Args:
        args: with `check_for_nan_in_loss_and_grad` and `check_for_spiky_loss`.
        loss: scalar.
    """
    machine = get_rerun_state_machine()
    if args.check_for_nan_in_loss_and_grad:
        for is_wrong, kind in ((torch.isnan, "NaN"), (torch.isinf, "Inf")):
            machine.validate_result(
                result=loss,
                rejection_func=is_wrong,
                message=f"found {kind} in local forward loss calculation",
                tolerance=0.0,
                fatal=True,
            )
    if args.check_for_spiky_loss:
        machine.validate_result(
            result=loss,
            rejection_func=partial(machine.is_unexpectedly_large, threshold=SPIKE, context="loss"),
            message="Spiky loss",
            tolerance=0.0,
            fatal=False,
        )
