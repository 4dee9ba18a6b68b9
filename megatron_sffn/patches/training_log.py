"""Numbers of Megatron's progress lines that Megatron 0.19 gets wrong.

Inputs: what `megatron.training.training.train` hands to its log after each step. Outputs: the same
lines with the right numbers.

- The first step after a start or a resume is logged at once, and its sums are kept for the line of
  its interval. Where the step ends its interval (always, with `--log-interval 1`), they would be
  counted again in the next line, which then is a mean of two intervals.
- A step that is skipped (fp16, an overflow) is not a step that `lm loss` is divided by, but the
  auxiliary losses of the skipped step would be added. A line whose steps were all skipped would say
  that the loss is 0.
- The norm of the parameters would be taken while other ranks' updates have not arrived, where their
  gather waits for the next forward pass (`--overlap-param-gather`).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch

from megatron_sffn.patches.registry import Adaptation

COUNTERS = ("advanced iterations", "skipped iterations", "nan iterations")
"""Entries of Megatron's sums that are no losses."""

_skipped: ContextVar[bool] = ContextVar("skipped", default=False)
"""Whether the step that is being logged was skipped."""


def _each_step_in_one_line(original: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron's `training_log`, with sums that are reset wherever their interval ends."""
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
            # Megatron prints no loss that is not at least 0, and resets it after the line.
            for name in set(sums) - set(COUNTERS):
                sums[name] = torch.full_like(sums[name], torch.nan)
        token = _skipped.set(bool(step["skipped_iter"]))
        try:
            return original(*call.args, **call.kwargs)
        finally:
            _skipped.reset(token)

    return training_log


def _without_skipped_steps(original: Callable[..., Any]) -> Callable[..., Any]:
    """A reporter of auxiliary losses, which adds those of a skipped step to no sum."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def report(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        if _skipped.get() and call.arguments.get("total_loss_dict") is not None:
            call.arguments["total_loss_dict"] = {}
        return original(*call.args, **call.kwargs)

    return report


def _of_gathered_parameters(original: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron's norm of the parameters, after the gather that would overlap the next forward."""

    @functools.wraps(original)
    def calc_params_l2_norm(model: Any, *args: Any, **kwargs: Any) -> Any:
        for chunk in model if isinstance(model, list) else [model]:
            if getattr(getattr(chunk, "ddp_config", None), "overlap_param_gather", False):
                with torch.no_grad():
                    chunk.start_param_sync(force_sync=True)
        return original(model, *args, **kwargs)

    return calc_params_l2_norm


REPLACEMENTS = (
    # Until NVIDIA/Megatron-LM#6237 is mended; needed in 0.19.
    Adaptation(
        target="megatron.training.training.training_log",
        make=_each_step_in_one_line,
        needed_by="megatron.training.training.train",
    ),
    # Until `training_log` hands a skipped step's auxiliary losses to nobody; needed in 0.19.
    Adaptation(
        target="megatron.core.transformer.moe.moe_logging.MoEMetricsTracker.report",
        make=_without_skipped_steps,
        needed_by="megatron.training.training.training_log",
    ),
    Adaptation(
        target="megatron.core.transformer.multi_token_prediction.MTPLossLoggingHelper"
        ".track_mtp_metrics",
        make=lambda original: staticmethod(_without_skipped_steps(original)),
        needed_by="megatron.training.training.training_log",
    ),
    # Until NVIDIA/Megatron-LM#7131 is mended; needed in 0.19.
    Adaptation(
        target="megatron.training.training.calc_params_l2_norm",
        make=_of_gathered_parameters,
        needed_by="megatron.training.training.train",
    ),
)
"""Without these, training runs and its log has wrong numbers."""
