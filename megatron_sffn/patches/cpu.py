"""Megatron on a host without CUDA: `torch.cuda` answers for the CPU, and collectives run over gloo.

Enters: a process whose `torch.cuda.is_available()` is really False. Leaves: the same process, in
which unmodified Megatron 0.19 trains. `install()` is called once by an entry point, before it
builds anything of Megatron's; on a CUDA machine it does nothing.

Choices
- Every adaptation is one row of `adaptations()`: the name that is replaced, what replaces it, and
  the Megatron code that needs it. A name that is gone (a new Megatron or torch) stops `install()`
  with a sentence that names it, never a strange crash later; a test checks every row.
- Factories (`torch.zeros(..., device="cuda")`) are wrapped one by one rather than through a
  `TorchFunctionMode`: a mode taxes every torch call of a training step, the wrappers only the few
  calls that create a tensor.
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

from megatron_sffn.patches.registry import Adaptation, apply

logger = logging.getLogger(__name__)

HOST_FLAGS: dict[str, tuple[str, Any]] = {
    "--transformer-impl local": ("transformer_impl", "local"),
    "--distributed-backend gloo": ("distributed_backend", "gloo"),
    "--no-masked-softmax-fusion": ("masked_softmax_fusion", False),
    "--no-gradient-accumulation-fusion": ("gradient_accumulation_fusion", False),
    "--no-bias-gelu-fusion": ("bias_gelu_fusion", False),
    "--no-bias-swiglu-fusion": ("bias_swiglu_fusion", False),
    "--no-bias-dropout-fusion": ("bias_dropout_fusion", False),
    "--no-persist-layer-norm": ("no_persist_layer_norm", True),
    "--no-rope-fusion": ("apply_rope_fusion", False),
}
"""Megatron's flags for the paths that exist without CUDA: as typed -> (argparse dest, value)."""

_INSTALLED = "_megatron_sffn_host"
_CPU = torch.device("cpu")


def is_host() -> bool:
    """Whether this process has no usable CUDA device (also true after `install()`)."""
    return hasattr(torch, _INSTALLED) or not torch.cuda.is_available()


def install() -> None:
    """Adapt this process so that Megatron runs on the CPU; on a CUDA machine, do nothing.

    Raises:
        ConfigError: if a name that has to be replaced no longer exists.
    """
    if hasattr(torch, _INSTALLED) or torch.cuda.is_available():
        return
    # Megatron decorates functions with torch.compile, and dynamo asks the CUDA driver.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    # torch asks for huge pages: a gradient of E·k cells in fresh small ones costs as much as to
    # compute it (benchmarks/NOTES.md).
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    setattr(torch, _INSTALLED, True)
    for adaptation in adaptations():
        apply(adaptation)
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(_not_the_tracker_remark)


def adaptations() -> tuple[Adaptation, ...]:
    """Every name that is replaced, with the Megatron code that needs it."""

    def row(target: str, make: Callable[[Any], Any], needed_by: str) -> Adaptation:
        return Adaptation(target=target, make=make, needed_by=f"megatron.{needed_by}")

    schedule = "core.pipeline_parallel.schedules.forward_backward_no_pipelining"
    bucket_group = "core.distributed.param_and_grad_buffer._ParamAndGradBucketGroup"
    dispatcher = "core.transformer.moe.token_dispatcher.MoEAlltoAllTokenDispatcher"
    memory_report = "training.utils.common_utils.report_memory"
    tracker = "core.tensor_parallel.random.CudaRNGStatesTracker"
    return (
        # What kind of machine is this?
        row("torch.cuda.is_available", _answer(True), "training.initialize.initialize_megatron"),
        row("torch.cuda.device_count", _answer(1), "training.initialize._initialize_distributed"),
        row("torch.cuda.set_device", _answer(None), "training.initialize._initialize_distributed"),
        row("torch.cuda.current_device", _answer(_CPU), "training.initialize.initialize_megatron"),
        row(
            "torch.cuda.get_device_properties",
            _answer(types.SimpleNamespace(name="cpu", major=0, minor=0, total_memory=0)),
            "training.utils.common_utils.get_device_arch_version",
        ),
        row(
            "torch.cuda.get_device_capability",
            _answer((0, 0)),
            "training.arguments.validate_args",
        ),
        # torch's own code asks this one, and must go on hearing the truth: the Adam that Megatron
        # uses, before a graph capture, and the DataLoader, before it pins memory.
        row("torch.accelerator.is_available", _answer(False), "core.optimizer"),
        # Before torch 2.12 Adam asks this instead, once `torch.cuda` says that it is there.
        row("torch.cuda.is_current_stream_capturing", _answer(False), "core.optimizer"),
        # Tensors that ask for the GPU.
        row("torch.tensor", _on_host, "core.optimizer.grad_scaler.DynamicGradScaler"),
        row("torch.zeros", _on_host, schedule),
        row("torch.ones", _on_host, "core.transformer.utils.get_default_causal_mask"),
        row("torch.rand", _on_host, "training.initialize._warmup_jit_function"),
        row("torch.Tensor.cuda", _stay, "core.optimizer.grad_scaler.DynamicGradScaler"),
        row("torch.nn.Module.cuda", _stay, "training.models.dist_utils"),
        row(
            "torch.Tensor.type",
            _cuda_type_name,
            "core.optimizer.optimizer.Float16OptimizerWithFloat16Params",
        ),
        # Streams and events: work on a host is done when the call returns.
        row("torch.cuda.Stream", lambda _: HostStream, "training.models.dist_utils"),
        row("torch.cuda.Event", lambda _: HostEvent, "core.transformer.moe.moe_layer.MoELayer"),
        row("torch.cuda.stream", lambda _: contextlib.nullcontext, bucket_group),
        row("torch.cuda.current_stream", _answer(HostStream()), bucket_group),
        row("torch.cuda.synchronize", _answer(None), "core.timers.Timer"),
        row("torch.cuda.empty_cache", _answer(None), "training.training.train"),
        # Random numbers: the CPU's default generator stands for the GPU's.
        row("torch.cuda.get_rng_state", _of_cpu(torch.get_rng_state), tracker),
        row("torch.cuda.set_rng_state", _of_cpu(torch.set_rng_state), "training.checkpointing"),
        row("torch.cuda.manual_seed", _of_cpu(torch.manual_seed), tracker),
        row(
            "megatron.core.tensor_parallel.random._get_cuda_rng_state",
            lambda _: lambda *args, **kwargs: torch.get_rng_state(),
            tracker,
        ),
        row(
            "megatron.core.tensor_parallel.random._set_cuda_rng_state",
            lambda _: lambda new_state, *args, **kwargs: torch.set_rng_state(new_state),
            tracker,
        ),
        row(
            "torch.utils.data.DataLoader.__iter__",
            _keep_generator,
            "training.training.build_train_valid_test_data_iterators",
        ),
        # Memory reports: the caching allocator does not exist here.
        row("torch.cuda.memory_allocated", _answer(0), memory_report),
        row("torch.cuda.max_memory_allocated", _answer(0), memory_report),
        row("torch.cuda.memory_reserved", _answer(0), memory_report),
        row("torch.cuda.max_memory_reserved", _answer(0), memory_report),
        row(
            "torch.cuda.memory_stats",
            _answer(collections.defaultdict(int)),
            "training.training.training_log",
        ),
        # Megatron's own function that copies from the GPU.
        row(
            "megatron.core.transformer.moe.token_dispatcher.maybe_move_tensor_to_cpu",
            _sizes_as_numbers,
            dispatcher,
        ),
    )


class HostStream:
    """A CUDA stream on a host: every wait is over."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Accept what `torch.cuda.Stream` accepts."""

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
    """A CUDA event on a host: it has happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Accept what `torch.cuda.Event` accepts."""

    def record(self, stream: HostStream | None = None) -> None:
        """Nothing is pending."""

    def wait(self, stream: HostStream | None = None) -> None:
        """Nothing is pending."""

    def synchronize(self) -> None:
        """Nothing is pending."""


def _answer(value: Any) -> Callable[[Any], Any]:
    """A replacement that returns `value` whatever it is asked."""
    return lambda original: lambda *args, **kwargs: value


def _of_cpu(function: Callable[..., Any]) -> Callable[[Any], Any]:
    """A replacement that calls the CPU's function; the device argument, if any, falls away."""

    def make(original: Any) -> Callable[..., Any]:
        def on_cpu(*args: Any, device: Any = None) -> Any:
            return function(*args)

        return on_cpu

    return make


def _on_host(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A tensor factory that reads `device="cuda"` as the CPU."""

    @functools.wraps(factory)
    def on_host(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return on_host


def _stay(original: Callable[..., Any]) -> Callable[..., Any]:
    """`tensor.cuda()` and `module.cuda()`: they are already where the work is done."""
    return lambda self, *args, **kwargs: self


def _cuda_type_name(original: Callable[..., Any]) -> Callable[..., Any]:
    """`tensor.type()` answers the name that the mixed-precision optimizers compare with."""

    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original(self, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer

    return type_name


def _sizes_as_numbers(original: Callable[..., Any]) -> Callable[..., Any]:
    """Split sizes become numpy also when they begin on the CPU: `all_to_all_single` wants that."""

    def sizes(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    return sizes


def _keep_generator(original: Callable[..., Any]) -> Callable[..., Any]:
    """`iter(loader)` without moving the default generator.

    The iterator draws a seed from it. On a host it is also the dropout generator, and iterators are
    made after a checkpoint has restored it: a resumed run would draw other masks.
    """

    def iterate(self: Any) -> Any:
        state = torch.get_rng_state()
        try:
            return original(self)
        finally:
            torch.set_rng_state(state)

    return iterate


def _not_the_tracker_remark(record: logging.LogRecord) -> bool:
    """Drop the one remark of Megatron's RNG tracker that is always true on a host."""
    return "CPU RNG state changed within GPU RNG context" not in record.getMessage()
