"""Imports and kernels that doctor runs in another process, because they may crash.

Inputs: the name of a function of this file. Outputs: its result in JSON, as the last line.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

from megatron_sffn.utils.warning_filters import silence


def torch() -> dict[str, Any]:
    """The installed torch, its CUDA, the GPUs that it sees, and its collective backends."""
    import torch
    from torch import distributed

    cuda = torch.cuda.is_available()
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "available": cuda,
        "gpus": [
            {"name": gpu.name, "bytes": gpu.total_memory, "capability": [gpu.major, gpu.minor]}
            for gpu in gpus
        ],
        "architectures": torch.cuda.get_arch_list() if cuda else [],
        "gloo": distributed.is_available() and distributed.is_gloo_available(),
        "nccl": _nccl(torch) if distributed.is_available() else None,
    }


def _nccl(torch: Any) -> str | None:
    if not torch.distributed.is_nccl_available():
        return None
    return ".".join(map(str, torch.cuda.nccl.version()))


def megatron() -> dict[str, Any]:
    """Megatron with its training loop, as the entry point imports it."""
    from megatron_sffn.patches import prepare
    from megatron_sffn.utils.errors import ConfigError

    try:
        prepare()
    except ConfigError as error:
        # The sentence of this error names doctor; show the error of the import itself.
        raise error.__cause__ or error from None
    for name in ("megatron.core", "megatron.training", "megatron_sffn.train.run"):
        importlib.import_module(name)
    return {}


def transformer_engine() -> dict[str, Any]:
    """Transformer Engine's package for torch."""
    importlib.import_module("transformer_engine.pytorch")
    return {}


def dali() -> dict[str, Any]:
    """NVIDIA DALI."""
    importlib.import_module("nvidia.dali.pipeline")
    return {}


def triton() -> dict[str, Any]:
    """A kernel that doubles 4 numbers, on the GPU unless it is interpreted."""
    import torch
    import triton
    import triton.language as tl

    @triton.jit
    def double(x, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
        o_x = tl.arange(0, SIZE)
        tl.store(x + o_x, 2 * tl.load(x + o_x))

    x = torch.ones(4, device="cpu" if triton.knobs.runtime.interpret else "cuda")
    double[(1,)](x, SIZE=4)
    assert x.tolist() == [2.0] * 4, x
    return {"version": triton.__version__}


def kernels() -> dict[str, Any]:
    """Load our C++ kernels, and build them if the cache has none."""
    import logging

    from megatron_sffn.ops import compiled

    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger(compiled.__name__)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    loaded = compiled.kernels() is not None
    return {"loaded": loaded, "message": messages[-1], "built": loaded and len(messages) > 1}


if __name__ == "__main__":
    silence()
    print("\n" + json.dumps(globals()[sys.argv[1]]()))
