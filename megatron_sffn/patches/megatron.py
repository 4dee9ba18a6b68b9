"""Names of Megatron 0.19 that every machine needs replaced, with a GPU or without.

`PATCHES` are those without which training does not start, `FASTER_OPTIMIZER` those without which it
is slower where neither Transformer Engine nor apex is installed.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch

from megatron_sffn.patches.registry import Patch, apply


def install() -> None:
    """Replace the names; idempotent.

    Raises:
        ConfigError: if a name does not exist.
    """
    for patch in PATCHES if _has_fused_optimizers() else (*PATCHES, *FASTER_OPTIMIZER):
        apply(patch)


def _has_fused_optimizers() -> bool:
    """True if Megatron takes Adam and gradient clipping from Transformer Engine or apex."""
    return any(map(importlib.util.find_spec, ("transformer_engine", "amp_C")))


def _compile_unless_compiled(original: Callable[[], None]) -> Callable[[], None]:
    """Compile the index helper only if the wheel does not contain the compiled one."""

    def compile_helpers() -> None:
        try:
            importlib.import_module("megatron.core.datasets.helpers_cpp")
        except ImportError:
            original()

    return compile_helpers


def _norm_under_sequence_parallel(original: Callable[..., Any]) -> Callable[..., Any]:
    """Build torch's norm, and mark its parameters for the gradient all-reduce over TP ranks."""

    def new(cls: type, config: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
        plain = types.SimpleNamespace(**vars(config))
        plain.sequence_parallel = False
        plain.persist_layer_norm = False  # selects a kernel of apex; torch has only one
        norm: torch.nn.Module = original(cls, plain, *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm

    return new


def _fused(original: Callable[..., None]) -> Callable[..., None]:
    """Make `fused=True` the default of Adam, and of AdamW, which inherits from it."""

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        if not (kwargs.get("foreach") or kwargs.get("capturable") or kwargs.get("differentiable")):
            kwargs["fused"] = True if kwargs.get("fused") is None else kwargs["fused"]
        original(self, *args, **kwargs)

    return init


def _scale_in_place(original: Callable[..., None]) -> Callable[..., None]:
    """Multiply gradients by a factor in place."""

    def scale(chunk: int, overflow: torch.Tensor, lists: Any, factor: float) -> None:
        for source, target in zip(*lists, strict=True):
            torch.mul(source, factor, out=target)

    return scale


def _with_channels_of_values(original: Callable[..., None]) -> Callable[..., None]:
    """Let values have another width than queries and keys, as in multi-latent attention."""

    @functools.wraps(original)
    def init(
        self: Any,
        config: Any,
        *args: Any,
        k_channels: int | None = None,
        v_channels: int | None = None,
        **kwargs: Any,
    ) -> None:
        original(self, config, *args, **kwargs)
        if v_channels is not None:
            self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition

    return init


def _with_whole_latents(original: Callable[..., Any]) -> Callable[..., Any]:
    """Gather the latents of keys and values over TP ranks, with the gradient of all their heads."""

    def project(self: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        from megatron.core.tensor_parallel import mappings

        query_latents, latents = original(self, hidden_states)
        widths = [self.config.kv_lora_rank, self.config.qk_pos_emb_head_dim]
        if latents.size(-1) == sum(widths):
            return query_latents, latents
        group = self.tp_group
        latents = mappings.gather_from_tensor_model_parallel_region(latents, group=group)
        if self.config.sequence_parallel:
            # Megatron then gathers the rotary part, whose backward pass adds up all ranks.
            return query_latents, mappings.scatter_to_sequence_parallel_region(latents, group=group)
        latent, rotary = latents.split(widths, dim=-1)
        rotary = mappings.copy_to_tensor_model_parallel_region(rotary, group=group)
        return query_latents, torch.cat((latent, rotary), dim=-1)

    return project


def _norm_without_engine(original: Any) -> Any:
    """Megatron's own norm where Transformer Engine is not installed."""
    if importlib.util.find_spec("transformer_engine") is not None:
        return original

    def norm(config: Any, hidden_size: int, eps: float) -> torch.nn.Module:
        from megatron.core.models.backends import LocalSpecProvider

        build = LocalSpecProvider().layer_norm(rms_norm=config.normalization == "RMSNorm")
        module: torch.nn.Module = build(config=config, hidden_size=hidden_size, eps=eps)
        return module

    return norm


PATCHES = (
    Patch(
        target="megatron.core.datasets.utils.compile_helpers",
        make=_compile_unless_compiled,
        needed_by="megatron.training.initialize._compile_dependencies",
        why="start-up runs `make`, which fails: the wheel has the compiled helper but no Makefile",
        until="Megatron does not compile a helper that its wheel contains",
    ),
    Patch(
        target="megatron.core.transformer.torch_norm.WrappedTorchNorm.__new__",
        make=_norm_under_sequence_parallel,
        needed_by="megatron.core.transformer.torch_norm.WrappedTorchNorm",
        why="torch's norms, used without Transformer Engine and apex, refuse sequence parallelism",
        until="Megatron marks their parameters as sequence-parallel",
    ),
    Patch(
        target="megatron.core.transformer.dot_product_attention.DotProductAttention.__init__",
        make=_with_channels_of_values,
        needed_by="megatron.core.models.backends.LocalSpecProvider",
        why="multi-latent attention needs Transformer Engine, whose attention takes two widths",
        until="Megatron's own attention takes k_channels and v_channels",
        fixed=lambda attention: (
            {"k_channels", "v_channels"} <= inspect.signature(attention.__init__).parameters.keys()
        ),
    ),
    Patch(
        target="megatron.core.transformer.multi_latent_attention.MLASelfAttention."
        "_qkv_down_projection",
        make=_with_whole_latents,
        needed_by="megatron.core.transformer.multi_latent_attention.MLASelfAttention",
        why="under tensor parallelism without Transformer Engine, the rotary part of keys gets the "
        "gradient of one rank's heads alone",
        until="Megatron adds up this gradient over tensor-parallel ranks",
    ),
    Patch(
        target="megatron.core.models.hybrid.hybrid_block.TENorm",
        make=_norm_without_engine,
        needed_by="megatron.core.models.hybrid.hybrid_block.HybridStack",
        why="the norm after the last layer of a hybrid model needs Transformer Engine",
        until="the spec of a hybrid stack names its last norm",
        fixed=lambda hybrid_block: not hasattr(hybrid_block, "TENorm"),
    ),
)
"""Without these, training does not start."""

FASTER_OPTIMIZER = (
    Patch(
        target="torch.optim.Adam.__init__",
        make=_fused,
        needed_by="megatron.core.optimizer",
        why="Adam passes eleven times over each weight, gradient and moment instead of once",
        until="Megatron builds torch's Adam with fused=True",
    ),
    Patch(
        target="megatron.core.optimizer.clip_grads.multi_tensor_scale_impl",
        make=_scale_in_place,
        needed_by="megatron.core.optimizer.clip_grads",
        why="gradient clipping copies every gradient",
        until="Megatron's own multi_tensor_scale works in place",
    ),
)
"""Without these, training is slower; for machines without Transformer Engine and apex."""
