"""Where the hardware questions are asked, once; the answer is one logged line.

Enters: nothing. Leaves: this process adapted to its machine, and the defaults of Megatron's flags
that the machine needs. A CUDA machine with Transformer Engine needs none.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

from megatron_sffn.platforms import cpu, optimizer

WITHOUT_TRANSFORMER_ENGINE: dict[str, tuple[str, Any]] = {
    text: setting
    for text, setting in cpu.HOST_FLAGS.items()
    if text != "--distributed-backend gloo"
}
"""As `cpu.HOST_FLAGS`: Megatron's flags for its own modules, where fused ones are absent."""


def prepare() -> tuple[dict[str, Any], str]:
    """Adapt this process; to be called before Megatron is imported.

    Returns:
        Defaults of Megatron's flags (argparse dest -> value), and the line that says why; both are
        empty where nothing is needed.
    """
    # Nothing is fetched unless that is asked for; the hub's library asks when it is imported.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    cpu.install()
    optimizer.install()
    if cpu.is_host():
        flags, why = cpu.HOST_FLAGS, "no CUDA device: training on the CPU"
    elif importlib.util.find_spec("transformer_engine") is None:
        flags, why = WITHOUT_TRANSFORMER_ENGINE, "no Transformer Engine: Megatron's own modules"
    else:
        return {}, ""
    return dict(flags.values()), f"{why}, with {' '.join(flags)}"
