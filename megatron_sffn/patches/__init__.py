"""Every name of torch and Megatron that we replace, and the flags that this machine needs.

`prepare()` adapts a process before Megatron is imported. `python -m megatron_sffn.patches` prints
the registry, `PATCHES_BY_OCCASION`: each name with the code that needs it, why, and until when.

A CUDA machine with Transformer Engine and NVIDIA's apex needs no flags.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

from megatron_sffn.patches import (
    cpu,
    gpt_checkpoints,
    later,
    megatron,
    muon,
    optimizer,
    recurrence,
    run_hooks,
    training_log,
    unpickling,
)
from megatron_sffn.patches.registry import Patch

PATCHES_BY_OCCASION: dict[str, tuple[Patch, ...]] = {
    "on every machine": megatron.PATCHES,
    "on every machine, for Megatron's main": later.PATCHES,
    "on every machine, for checkpoints of the optimizer": optimizer.PATCHES,
    "on every machine, for a GPT's checkpoint in a hybrid model": gpt_checkpoints.PATCHES,
    "on every machine, for Muon": muon.PATCHES,
    "on every machine, for numbers in the log": training_log.PATCHES,
    "on every machine, for checkpoints that run no code": unpickling.PATCHES,
    "in a training run": run_hooks.PATCHES,
    "on a machine without Transformer Engine and apex": megatron.FASTER_OPTIMIZER,
    "on a machine without CUDA": cpu.PATCHES,
    "on a machine without CUDA, for Mamba and gated delta nets": recurrence.PATCHES,
}
"""When names are replaced -> the patches."""

WITHOUT_TRANSFORMER_ENGINE: dict[str, tuple[str, Any]] = {
    text: setting
    for text, setting in cpu.HOST_FLAGS.items()
    if text != "--distributed-backend gloo"
}
"""The flags of `cpu.HOST_FLAGS` that a CUDA machine needs too, in the same form."""

FUSED_BY_APEX = {
    "--no-gradient-accumulation-fusion": "fused_weight_gradient_mlp_cuda",
    "--no-masked-softmax-fusion": "scaled_upper_triang_masked_softmax_cuda",
    "--no-persist-layer-norm": "fused_layer_norm_cuda",
}
"""Flag of `cpu.HOST_FLAGS` -> module of NVIDIA's apex that makes it unnecessary."""


def prepare() -> tuple[dict[str, Any], str]:
    """Adapt this process; call it before Megatron is imported.

    Returns:
        Defaults of Megatron's flags (argparse dest -> value), and the line that says why; both are
        empty if this machine needs none.

    Raises:
        ConfigError: if Megatron cannot be imported, for example because Transformer Engine is
            half-installed, or if it lacks a name that is replaced.
    """
    # Nothing is downloaded unless a user asks for it; the hub's library reads this at import.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    cpu.install()
    megatron.install()
    later.install()
    training_log.install()
    optimizer.install()
    muon.install()
    unpickling.install()
    gpt_checkpoints.install()
    if cpu.is_host():
        recurrence.install()
        flags, reason = cpu.HOST_FLAGS, "no CUDA device: training on the CPU"
    elif not _is_installed("transformer_engine"):
        flags, reason = WITHOUT_TRANSFORMER_ENGINE, "no Transformer Engine: Megatron's own modules"
    else:
        # Megatron computes the logits in a layer of its own, with Transformer Engine too.
        logits = "--no-gradient-accumulation-fusion"
        flags, reason = {logits: cpu.HOST_FLAGS[logits]}, "no apex of NVIDIA's"
    if not cpu.is_host():
        flags = {text: flags[text] for text in flags if not _is_installed(FUSED_BY_APEX.get(text))}
    return dict(flags.values()), f"{reason}, with {' '.join(flags)}" if flags else ""


def _is_installed(module: str | None) -> bool:
    """True if a module is installed; it is not imported."""
    return module is not None and importlib.util.find_spec(module) is not None
