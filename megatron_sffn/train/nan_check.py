"""Checks losses and router scores for NaN and infinity, once per step.

Inputs: the loss of each microbatch, and the flag that each router keeps on the device.
Outputs: the same `FloatingPointError` on all ranks, before the optimizer changes a weight, or at
the end of an evaluation. After that, Megatron's own checks of the loss run.

Design notes:
- A rank that raises alone leaves the others waiting in a collective operation. So the flags of all
  layers are reduced over all ranks, in one small all-reduce, and every rank raises the same error.
- Megatron's checks of the loss run after this check, since they would end one rank alone with a
  sentence that names no layer. They are called in the order of the microbatches.
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
from megatron_sffn.nn.layer_pattern import count_layers

SPIKE = 10.0
"""A loss is a spike if it exceeds the largest so far by this factor, as in Megatron's own loss."""

CAUSE = "the hidden states or weights that they come from have diverged"


class NanCheck:
    """Keeps the losses of a step, and checks them and the router scores.

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
            model: this rank's model chunks.

        Raises:
            FloatingPointError: on all ranks, if scores of a layer are NaN or infinite on one of
                them; or if a loss is, in the first step of a process. Megatron does not check that
                step, and would save weights that are NaN.
            RuntimeError: raised by Megatron, if a loss is NaN or infinite in a later step and
                `--rerun-mode` is disabled; otherwise Megatron runs the step again, then decides.
        """
        step = self.args.curr_iteration + 1
        is_first_step = not get_rerun_state_machine().first_iteration_complete
        loss = self._check_scores(model, f"step {step}")
        if loss and is_first_step:
            raise FloatingPointError(
                f"the loss is {loss} in the first step, step {step}; the weights that were loaded, "
                "or the flags, do not work"
            )
        self._check_losses()

    def after_evaluation(self, model: list[torch.nn.Module], iteration: int) -> None:
        """Called on all ranks when an evaluation has ended.

        Args:
            model: this rank's model chunks.
            iteration: steps that the model was trained.

        Raises:
            FloatingPointError: on all ranks, if scores or a loss are NaN or infinite on one.
        """
        place = f"evaluation after step {iteration}"
        if loss := self._check_scores(model, place):
            raise FloatingPointError(
                f"the loss is {loss} in the {place}; the weights have diverged"
            )
        self._check_losses()

    def _check_scores(self, model: list[torch.nn.Module], place: str) -> str:
        """Raise if scores are NaN or infinite; returns "nan" or "inf" if a loss is, else "".

        This also copies the losses to the host, so that the host waits for the device only once.
        """
        flags = self._flags(model)
        numbers = torch.cat((flags, *(loss.reshape(1) for loss in self._losses))).tolist()
        *layer_flags, loss_flag = numbers[: len(flags)]
        self._losses = [torch.tensor(number) for number in numbers[len(flags) :]]
        for layer, flag in enumerate(layer_flags, start=1):
            if flag:
                raise FloatingPointError(
                    f"{place}, layer {layer}, router {self.args.sffn_router}: scores are NaN or "
                    f"infinite; {CAUSE}"
                )
        return ("", "inf", "nan")[int(loss_flag)]

    @torch.no_grad()
    def _flags(self, model: list[torch.nn.Module]) -> Tensor:
        """`[layers + 1]`, the maximum over all ranks: a flag per layer, then one for the losses.

        A layer's flag is 1 if its scores are NaN or infinite. The flag of the losses is 2 if one is
        NaN, 1 if one is infinite, and 0 if `--no-check-for-nan-in-loss-and-grad` is given.
        """
        device = torch.cuda.current_device()
        args = self.args
        num_layers = count_layers(args.num_layers, args.mtp_num_layers, args.hybrid_layer_pattern)
        flags = torch.zeros(num_layers + 1, device=device)
        for layer in (layer for chunk in model for layer in sparse_layers(chunk)):
            flags[layer.layer_number - 1] += layer.router.score_flag
        flags = flags.isnan().float()
        if self._losses and self.args.check_for_nan_in_loss_and_grad:
            losses = torch.stack(self._losses)
            flags[-1] = losses.isnan().any().float() + (~losses.isfinite()).any().float()
        torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
        return flags

    def _check_losses(self) -> None:
        """Run Megatron's checks of the losses, and forget the losses."""
        losses, self._losses = self._losses, []
        for loss in losses:
            check_loss(self.args, loss)


def check_loss(args: Namespace, loss: Tensor) -> None:
    """Run Megatron's checks of a microbatch's loss on this rank.

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
