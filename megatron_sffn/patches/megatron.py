"""What Megatron 0.19 needs on every machine, with a GPU or without.

Inputs: Megatron's modules, as the wheel has them. Outputs: the names of `REPLACEMENTS` replaced,
and those of `training_log.py`, which mend numbers in the log.

- Start-up compiles the helper of Megatron's data sets with `make`, and exits where that fails. The
  wheel has the compiled helper but no Makefile, so without the first row no training starts.
- torch's LayerNorm and RMSNorm, which Megatron uses where Transformer Engine and apex are absent,
  are refused under sequence parallelism. They only lack a mark on their parameters.
- Without Transformer Engine and apex, Megatron uses torch's Adam in its slow form, and clips
  gradients through a copy of each.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import types
from collections.abc import Callable
from typing import Any

import torch

from megatron_sffn.patches import training_log
from megatron_sffn.patches.registry import Adaptation, apply_once


def install() -> None:
    """Replace the names; called again, do nothing.

    Raises:
        ConfigError: if a name that has to be replaced no longer exists.
    """
    apply_once(REPLACEMENTS)
    apply_once(training_log.REPLACEMENTS)
    if not _has_fused_optimizers():
        apply_once(FASTER_OPTIMIZER)


def _has_fused_optimizers() -> bool:
    """Whether Megatron takes Adam and gradient clipping from Transformer Engine or apex."""
    return any(map(importlib.util.find_spec, ("transformer_engine", "amp_C")))


def _compile_unless_compiled(original: Callable[[], None]) -> Callable[[], None]:
    """Compile the index helper only where the wheel did not bring it."""

    def compile_helpers() -> None:
        try:
            importlib.import_module("megatron.core.datasets.helpers_cpp")
        except ImportError:
            original()

    return compile_helpers


def _norm_under_sequence_parallel(original: Callable[..., Any]) -> Callable[..., Any]:
    """Build torch's norm, and mark its parameters for the gradient sum over TP ranks."""

    def new(cls: type, config: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
        plain = types.SimpleNamespace(**vars(config))
        plain.sequence_parallel = False
        plain.persist_layer_norm = False  # asks apex's kernel to stay resident; torch has no such
        norm: torch.nn.Module = original(cls, plain, *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm

    return new


def _fused(original: Callable[..., None]) -> Callable[..., None]:
    """Make torch's fused form the default of Adam, and of AdamW, which inherits from it."""

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        if not (kwargs.get("foreach") or kwargs.get("capturable") or kwargs.get("differentiable")):
            kwargs["fused"] = True if kwargs.get("fused") is None else kwargs["fused"]
        original(self, *args, **kwargs)

    return init


def _scale_in_place(original: Callable[..., None]) -> Callable[..., None]:
    """Multiply gradients by a factor without a copy of them."""

    def scale(chunk: int, overflow: torch.Tensor, lists: Any, factor: float) -> None:
        for source, target in zip(*lists, strict=True):
            torch.mul(source, factor, out=target)

    return scale


REPLACEMENTS = (
    Adaptation(
        target="megatron.core.datasets.utils.compile_helpers",
        make=_compile_unless_compiled,
        needed_by="megatron.training.initialize._compile_dependencies",
    ),
    Adaptation(
        target="megatron.core.transformer.torch_norm.WrappedTorchNorm.__new__",
        make=_norm_under_sequence_parallel,
        needed_by="megatron.core.transformer.torch_norm.WrappedTorchNorm",
    ),
)
"""Without these, training does not start."""

FASTER_OPTIMIZER = (
    # One pass over each weight, gradient and moment instead of eleven.
    Adaptation(
        target="torch.optim.Adam.__init__",
        make=_fused,
        needed_by="megatron.core.optimizer",
    ),
    # One pass over each gradient, and no copy of it.
    Adaptation(
        target="megatron.core.optimizer.clip_grads.multi_tensor_scale_impl",
        make=_scale_in_place,
        needed_by="megatron.core.optimizer.clip_grads",
    ),
)
"""Without these, training is slower; for machines without Transformer Engine and apex."""
