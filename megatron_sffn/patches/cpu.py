"""Megatron on a host without CUDA: `torch.cuda` answers for the CPU, and collectives run over gloo.

Inputs: a process whose `torch.cuda.is_available()` is really False. Outputs: the same process, in
which unmodified Megatron 0.19 trains. An entry point calls `install()` once, before it builds
anything of Megatron's; on a CUDA machine it does nothing.

Design notes:
- A name that does not exist (a new Megatron or torch) stops `install()` with a sentence that names
  it, before it can cause a crash that nobody understands; a test checks every row of `PATCHES`.
- Factories (`torch.zeros(..., device="cuda")`) are wrapped one by one, not by a
  `TorchFunctionMode`: a mode slows every torch call of a training step, the wrappers slow only the
  few calls that create a tensor.
- The "CUDA generator" is the CPU's default generator, so that Megatron's RNG tracker, dropout,
  recomputation and checkpoints keep their meaning.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import logging
import os
import types
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._device import _device_constructors

from megatron_sffn.patches.registry import Make, Patch, apply

HOST_FLAGS: dict[str, tuple[str, Any]] = {
    "--transformer-impl local": ("transformer_impl", "local"),
    "--distributed-backend gloo": ("distributed_backend", "gloo"),
    "--no-masked-softmax-fusion": ("masked_softmax_fusion", False),
    "--no-gradient-accumulation-fusion": ("gradient_accumulation_fusion", False),
    "--no-bias-swiglu-fusion": ("bias_swiglu_fusion", False),
    "--no-bias-dropout-fusion": ("bias_dropout_fusion", False),
    "--no-persist-layer-norm": ("no_persist_layer_norm", True),
    "--no-rope-fusion": ("apply_rope_fusion", False),
}
"""Megatron's flags for the paths that exist without CUDA: as typed -> (argparse dest, value)."""

_INSTALLED = "_megatron_sffn_host"
_CPU = torch.device("cpu")


def is_host() -> bool:
    """True if this process has no usable CUDA device (also true after `install()`)."""
    return hasattr(torch, _INSTALLED) or not torch.cuda.is_available()


def install() -> None:
    """Adapt this process so that Megatron runs on the CPU; on a CUDA machine, do nothing.

    Raises:
        ConfigError: if a name that is replaced does not exist.
    """
    if hasattr(torch, _INSTALLED) or torch.cuda.is_available():
        return
    # Megatron decorates functions with torch.compile, and dynamo asks the CUDA driver.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    # torch then asks for huge pages: to allocate a gradient of E·k cells in small pages takes as
    # long as to compute it (benchmarks/NOTES.md).
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # `with torch.device(...)` looks its factories up at the first use, and would find the wrapped
    # ones: transformers then leaves buffers of a loaded model uninitialised.
    _device_constructors()
    setattr(torch, _INSTALLED, True)
    for patch in PATCHES:
        apply(patch)
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(_is_not_the_rng_remark)


class HostStream:
    """A CUDA stream on a host, where all work is done when its call returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Accept the arguments of `torch.cuda.Stream`."""

    def wait_stream(self, stream: HostStream) -> None:
        """Nothing is pending."""

    def wait_event(self, event: HostEvent) -> None:
        """Nothing is pending."""

    def synchronize(self) -> None:
        """Nothing is pending."""

    def record_event(self, event: HostEvent | None = None) -> HostEvent:
        """Return an event that has already happened."""
        return event or HostEvent()


class HostEvent:
    """A CUDA event on a host: it has always happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Accept the arguments of `torch.cuda.Event`."""

    def record(self, stream: HostStream | None = None) -> None:
        """Nothing is pending."""

    def wait(self, stream: HostStream | None = None) -> None:
        """Nothing is pending."""

    def synchronize(self) -> None:
        """Nothing is pending."""


def _answer(value: Any) -> Make:
    """A replacement that returns `value` for any arguments."""
    return lambda original: lambda *args, **kwargs: value


def _cpu_function(function: Callable[..., Any]) -> Make:
    """A replacement that calls the CPU's function without the `device` argument."""

    def make(original: Any) -> Callable[..., Any]:
        def on_cpu(*args: Any, device: Any = None) -> Any:
            return function(*args)

        return on_cpu

    return make


def _factory_on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A tensor factory that reads `device="cuda"` as the CPU."""

    @functools.wraps(factory)
    def on_host(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return on_host


def _return_self(original: Callable[..., Any]) -> Callable[..., Any]:
    """`tensor.cuda()` and `module.cuda()`, which are on the right device already."""
    return lambda self, *args, **kwargs: self


def _cuda_type_name(original: Callable[..., Any]) -> Callable[..., Any]:
    """`tensor.type()` returns the CUDA name that the mixed-precision optimizers compare with."""

    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original(self, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer

    return type_name


def _sizes_as_numbers(original: Callable[..., Any]) -> Callable[..., Any]:
    """Split sizes as numpy arrays, also if they are on the CPU: `all_to_all_single` needs them."""

    def sizes(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    return sizes


def _keep_generator(original: Callable[..., Any]) -> Callable[..., Any]:
    """`iter(loader)` that leaves the default generator as it was.

    The iterator draws a seed from the default generator. On a host this is also the generator of
    dropout, and iterators are built after a resume has restored it: the masks would differ.
    """

    def iterate(self: Any) -> Any:
        state = torch.get_rng_state()
        try:
            return original(self)
        finally:
            torch.set_rng_state(state)

    return iterate


def _is_not_the_rng_remark(record: logging.LogRecord) -> bool:
    """False for the remark of Megatron's RNG tracker that is always true on a host."""
    return "CPU RNG state changed within GPU RNG context" not in record.getMessage()


def _broadcast_params(original: Callable[[Any], None]) -> Callable[[Any], None]:
    """Send updated weights one by one, from the rank that has the state of each."""
    return lambda optimizer: optimizer.broadcast_params()


def _rows(why: str, *rows: tuple[str, Make, str]) -> tuple[Patch, ...]:
    """Patches with one reason, each given as target, `make` and the Megatron code that needs it."""
    return tuple(
        Patch(
            target=target,
            make=make,
            needed_by=f"megatron.{needed_by}",
            why=why,
            until="megatron-core trains on a machine without CUDA",
        )
        for target, make, needed_by in rows
    )


_RNG = "core.tensor_parallel.random"
_DDP = "core.distributed.param_and_grad_buffer._ParamAndGradBucketGroup"
_LAYER_WISE = "core.optimizer.layer_wise_optimizer.LayerWiseDistributedOptimizer"
_MEMORY_REPORT = "training.utils.common_utils.report_memory"

PATCHES = (
    *_rows(
        "Megatron asks for the CUDA device, and there is none",
        ("torch.cuda.is_available", _answer(True), "training.initialize.initialize_megatron"),
        ("torch.cuda.device_count", _answer(1), "training.initialize._initialize_distributed"),
        ("torch.cuda.set_device", _answer(None), "training.initialize._initialize_distributed"),
        ("torch.cuda.current_device", _answer(_CPU), "training.initialize.initialize_megatron"),
        (
            "torch.cuda.get_device_properties",
            _answer(types.SimpleNamespace(name="cpu", major=0, minor=0, total_memory=0)),
            "training.utils.common_utils.get_device_arch_version",
        ),
        (
            "torch.cuda.get_device_capability",
            _answer((0, 0)),
            "training.arguments.validate_args",
        ),
    ),
    *_rows(
        "torch's Adam and DataLoader ask this, and must be told that there is no accelerator",
        ("torch.accelerator.is_available", _answer(False), "core.optimizer"),
    ),
    *_rows(
        "Adam of torch before 2.12 asks this once `torch.cuda` says that it is available",
        ("torch.cuda.is_current_stream_capturing", _answer(False), "core.optimizer"),
    ),
    *_rows(
        "a tensor is created on the CUDA device, or moved to it",
        ("torch.tensor", _factory_on_cpu, "core.optimizer.grad_scaler.DynamicGradScaler"),
        (
            "torch.zeros",
            _factory_on_cpu,
            "core.pipeline_parallel.schedules.forward_backward_no_pipelining",
        ),
        ("torch.ones", _factory_on_cpu, "core.transformer.utils.get_default_causal_mask"),
        ("torch.rand", _factory_on_cpu, "training.initialize._warmup_jit_function"),
        ("torch.Tensor.cuda", _return_self, "core.optimizer.grad_scaler.DynamicGradScaler"),
        ("torch.nn.Module.cuda", _return_self, "training.models.dist_utils"),
    ),
    *_rows(
        "the optimizer compares the type of a tensor with names of CUDA tensors",
        (
            "torch.Tensor.type",
            _cuda_type_name,
            "core.optimizer.optimizer.Float16OptimizerWithFloat16Params",
        ),
    ),
    *_rows(
        "Megatron waits for CUDA streams and events",
        ("torch.cuda.Stream", lambda _: HostStream, "training.models.dist_utils"),
        ("torch.cuda.Event", lambda _: HostEvent, "core.transformer.moe.moe_layer.MoELayer"),
        ("torch.cuda.stream", lambda _: contextlib.nullcontext, _DDP),
        ("torch.cuda.current_stream", _answer(HostStream()), _DDP),
        ("torch.cuda.synchronize", _answer(None), "core.timers.Timer"),
        ("torch.cuda.empty_cache", _answer(None), "training.training.train"),
    ),
    *_rows(
        "Megatron draws random numbers from the CUDA generator",
        (
            "torch.cuda.get_rng_state",
            _cpu_function(torch.get_rng_state),
            f"{_RNG}.CudaRNGStatesTracker",
        ),
        (
            "torch.cuda.set_rng_state",
            _cpu_function(torch.set_rng_state),
            "training.checkpointing",
        ),
        (
            "torch.cuda.manual_seed",
            _cpu_function(torch.manual_seed),
            f"{_RNG}.CudaRNGStatesTracker",
        ),
        (
            f"megatron.{_RNG}._get_cuda_rng_state",
            lambda _: lambda *args, **kwargs: torch.get_rng_state(),
            f"{_RNG}.CudaRNGStatesTracker",
        ),
        (
            f"megatron.{_RNG}._set_cuda_rng_state",
            lambda _: lambda new_state, *args, **kwargs: torch.set_rng_state(new_state),
            f"{_RNG}.CudaRNGStatesTracker",
        ),
    ),
    *_rows(
        "a new data iterator draws from the CPU generator, which is that of dropout as well",
        (
            "torch.utils.data.DataLoader.__iter__",
            _keep_generator,
            "training.training.build_train_valid_test_data_iterators",
        ),
    ),
    *_rows(
        "Megatron reports the memory of the CUDA allocator",
        ("torch.cuda.memory_allocated", _answer(0), _MEMORY_REPORT),
        ("torch.cuda.max_memory_allocated", _answer(0), _MEMORY_REPORT),
        ("torch.cuda.memory_reserved", _answer(0), _MEMORY_REPORT),
        ("torch.cuda.max_memory_reserved", _answer(0), _MEMORY_REPORT),
        (
            "torch.cuda.memory_stats",
            _answer(collections.defaultdict(int)),
            "training.training.training_log",
        ),
    ),
    *_rows(
        "split sizes that are on the CPU already do not become numpy arrays",
        (
            "megatron.core.transformer.moe.token_dispatcher.maybe_move_tensor_to_cpu",
            _sizes_as_numbers,
            "core.transformer.moe.token_dispatcher.MoEAlltoAllTokenDispatcher",
        ),
    ),
    *_rows(
        "ranks gather weights of unequal size, which gloo refuses; Megatron's broadcast does not",
        (
            f"megatron.{_LAYER_WISE}.allgather_params",
            _broadcast_params,
            f"{_LAYER_WISE}.step_with_ready_grads",
        ),
    ),
)
"""Every name that is replaced on a host."""
