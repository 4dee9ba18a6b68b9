"""Fits this process to its machine, and logs the result as one line.

Outputs: torch and Megatron with some names replaced, and the defaults of Megatron's flags that the
machine needs. A CUDA machine with Transformer Engine and NVIDIA's apex needs no flags.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

from megatron_sffn.patches import cpu, megatron, optimizer, unpickling

WITHOUT_TRANSFORMER_ENGINE: dict[str, tuple[str, Any]] = {
    text: setting
    for text, setting in cpu.HOST_FLAGS.items()
    if text != "--distributed-backend gloo"
}
"""As `cpu.HOST_FLAGS`: Megatron's flags for its own modules, where fused ones are absent."""

FUSED_BY_APEX = {
    "--no-gradient-accumulation-fusion": "fused_weight_gradient_mlp_cuda",
    "--no-masked-softmax-fusion": "scaled_upper_triang_masked_softmax_cuda",
    "--no-persist-layer-norm": "fused_layer_norm_cuda",
}
"""Those of them that are not needed where NVIDIA's apex has compiled a module -> its name."""


def prepare() -> tuple[dict[str, Any], str]:
    """Adapt this process; to be called before Megatron is imported.

    Returns:
        Defaults of Megatron's flags (argparse dest -> value), and the line that says why; both are
        empty where nothing is needed.

    Raises:
        ConfigError: if Megatron cannot be imported, as where Transformer Engine is half-installed,
            or lacks a name that is replaced.
    """
    # Nothing is fetched unless that is asked for; the hub's library asks when it is imported.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    cpu.install()
    megatron.install()
    optimizer.install()
    unpickling.install()
    if cpu.is_host():
        flags, why = cpu.HOST_FLAGS, "no CUDA device: training on the CPU"
    elif not _is_there("transformer_engine"):
        flags, why = WITHOUT_TRANSFORMER_ENGINE, "no Transformer Engine: Megatron's own modules"
    else:
        # Also beside Transformer Engine, the logits are computed by a layer of Megatron's own.
        logits = "--no-gradient-accumulation-fusion"
        flags, why = {logits: cpu.HOST_FLAGS[logits]}, "no apex of NVIDIA's"
    if not cpu.is_host():
        flags = {text: flags[text] for text in flags if not _is_there(FUSED_BY_APEX.get(text))}
    return dict(flags.values()), f"{why}, with {' '.join(flags)}" if flags else ""


def _is_there(module: str | None) -> bool:
    """Whether a module is installed; it is not imported."""
    return module is not None and importlib.util.find_spec(module) is not None
