"""Names of Megatron 0.19 that would write wrong numbers into its progress lines.

- The first step after a start or a resume is logged at once, and its sums are kept for the line of
  its interval. If the step also ends its interval (always, with `--log-interval 1`), the next line
  would count it again, as a mean of two intervals.
- `lm loss` is divided by the steps that were not skipped (fp16 skips a step on overflow), but the
  auxiliary losses of skipped steps would be added to their sums. A line whose steps were all
  skipped would show a loss of 0.
- With `--overlap-param-gather` the norm of the parameters would be taken before the updates of the
  other ranks arrive, since their gather waits for the next forward pass.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch

from megatron_sffn.patches.registry import Patch, apply


def install() -> None:
    """Replace the names; idempotent.

    Raises:
        ConfigError: if a name does not exist.
    """
    for patch in PATCHES:
        apply(patch)


COUNTERS = ("advanced iterations", "skipped iterations", "nan iterations")
"""Entries of Megatron's sums that are not losses."""

_skipped: ContextVar[bool] = ContextVar("skipped", default=False)
"""True if the step that is being logged was skipped."""


def _log_each_step_once(original: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron's `training_log`, with sums that are reset when their interval ends."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def training_log(*args: Any, **kwargs: Any) -> Any:
        from megatron.training.global_vars import get_args

        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        step, interval = call.arguments, get_args().log_interval
        ends_interval = step["iteration"] % interval == 0
        step["is_first_iteration"] = step["is_first_iteration"] and not ends_interval
        sums = step["total_loss_dict"]
        if step["skipped_iter"] and ends_interval and not sums.get(COUNTERS[0]):
            # Megatron prints losses of at least 0 alone: NaN leaves them out of this line.
            for name in set(sums) - set(COUNTERS):
                sums[name] = torch.full_like(sums[name], torch.nan)
        token = _skipped.set(bool(step["skipped_iter"]))
        try:
            return original(*call.args, **call.kwargs)
        finally:
            _skipped.reset(token)

    return training_log


def _without_skipped_steps(original: Callable[..., Any]) -> Callable[..., Any]:
    """A reporter of auxiliary losses that does not add those of a skipped step to the sums."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def report(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        if _skipped.get() and call.arguments.get("total_loss_dict") is not None:
            call.arguments["total_loss_dict"] = {}
        return original(*call.args, **call.kwargs)

    return report


def _of_gathered_parameters(original: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron's norm of the parameters, after the gather that overlaps the next forward pass."""

    @functools.wraps(original)
    def calc_params_l2_norm(model: Any, *args: Any, **kwargs: Any) -> Any:
        for chunk in model if isinstance(model, list) else [model]:
            if getattr(getattr(chunk, "ddp_config", None), "overlap_param_gather", False):
                with torch.no_grad():
                    chunk.start_param_sync(force_sync=True)
        return original(model, *args, **kwargs)

    return calc_params_l2_norm


PATCHES = (
    Patch(
        target="megatron.training.training.training_log",
        make=_log_each_step_once,
        needed_by="megatron.training.training.train",
        why="the second progress line counts the first step again",
        until="NVIDIA/Megatron-LM#6237 is mended",
    ),
    Patch(
        target="megatron.core.transformer.moe.moe_logging.MoEMetricsTracker.report",
        make=_without_skipped_steps,
        needed_by="megatron.training.training.training_log",
        why="the auxiliary losses of skipped steps are added to the means of the steps taken",
        until="Megatron's `training_log` leaves out the auxiliary losses of a skipped step",
    ),
    Patch(
        target="megatron.core.transformer.multi_token_prediction.MTPLossLoggingHelper"
        ".track_mtp_metrics",
        make=lambda original: staticmethod(_without_skipped_steps(original)),
        needed_by="megatron.training.training.training_log",
        why="the losses of skipped steps are added to the means of the steps taken",
        until="Megatron's `training_log` leaves out the auxiliary losses of a skipped step",
    ),
    Patch(
        target="megatron.training.training.calc_params_l2_norm",
        make=_of_gathered_parameters,
        needed_by="megatron.training.training.train",
        why="--overlap-param-gather: the norm of the parameters mixes old and new weights",
        until="NVIDIA/Megatron-LM#7131 is mended",
    ),
)
"""Without these, training runs and its log has wrong numbers."""
