"""Patches for a host without CUDA: each is needed, applied once, and does what Megatron needs."""

from __future__ import annotations

import importlib
import inspect
import json
import logging
import os
import re
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.moe import token_dispatcher
from megatron.training.arguments import add_megatron_arguments

from megatron_sffn.patches import cpu
from megatron_sffn.patches.registry import Patch, resolve
from megatron_sffn.utils.errors import ConfigError
from tests.support.processes import HANGS

pytestmark = pytest.mark.skipif(not cpu.is_host(), reason="this machine has CUDA: not adapted")

ROWS = cpu.PATCHES
TARGETS = [row.target for row in ROWS]

# A fresh process: which names exist before `install`, and which are replaced by it.
FRESH = """
import importlib, json, sys, warnings
warnings.simplefilter("ignore")
from megatron_sffn.patches import cpu
from megatron_sffn.patches.registry import resolve

def exists(name):
    try:
        importlib.import_module(name)
    except ImportError:
        resolve(name)

def values():
    return {row.target: getattr(*resolve(row.target)) for row in cpu.PATCHES}

before = values()
for row in cpu.PATCHES:
    exists(row.needed_by)
cpu.install()
after = values()
cpu.install()
replaced = [target for target in before if after[target] is not before[target]]
print(json.dumps({"replaced": replaced, "again": values() == after, "host": cpu.is_host()}))
"""


def test_every_name_exists_in_a_fresh_process_and_is_replaced_once() -> None:
    process = subprocess.run(
        [sys.executable, "-c", FRESH], capture_output=True, text=True, timeout=HANGS, check=False
    )
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout.splitlines()[-1]) == {
        "replaced": TARGETS,
        "again": True,
        "host": True,
    }


def test_no_name_is_replaced_twice() -> None:
    assert len(set(TARGETS)) == len(TARGETS)


OF_TORCH = {
    "torch.accelerator.is_available": "Megatron's optimizers are torch's, which ask it",
    "torch.cuda.is_current_stream_capturing": "torch's Adam of 2.11, before a graph capture",
}
"""Targets that Megatron uses only through torch -> how."""


@pytest.mark.parametrize("row", ROWS, ids=TARGETS)
def test_the_code_that_needs_a_patch_uses_the_replaced_name(row: Patch) -> None:
    owner, _, name = row.target.rpartition(".")
    uses = {
        "torch.cuda": rf"torch\.cuda\.{name}\b",
        "torch": rf"torch\.{name}\((?s:.){{0,200}}?device=",
        "torch.Tensor": rf"\.{name}\(",
        "torch.nn.Module": rf"\.{name}\(",
        "torch.utils.data.DataLoader": r"\biter\(",
    }.get(owner, rf"\b{name}\b")
    try:
        user: Any = importlib.import_module(row.needed_by)
    except ImportError:
        user = getattr(*resolve(row.needed_by))
    assert row.needed_by.startswith("megatron.")
    assert row.target in OF_TORCH or re.search(uses, inspect.getsource(user)), row


# install


@pytest.fixture
def not_installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process as if nothing had been installed; the patches come back after the test."""
    monkeypatch.delattr(torch, cpu._INSTALLED)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    yield
    if hasattr(torch, cpu._INSTALLED):
        delattr(torch, cpu._INSTALLED)


def row(target: str, make: Callable[[Any], Any]) -> Patch:
    return Patch(target=target, make=make, needed_by="megatron.a.b", why="it fails", until="later")


@pytest.mark.parametrize(
    "missing",
    ["torch.cuda.gone", "torch.gone.deeper", "megatron.core.gone.name", "no_such_package.name"],
)
@pytest.mark.usefixtures("not_installed")
def test_a_name_that_does_not_exist_is_an_error(
    monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setattr(cpu, "PATCHES", (row(missing, lambda original: original),))
    with pytest.raises(
        ConfigError, match=rf"^{missing}, .* for megatron\.a\.b, .*; install"
    ) as error:
        cpu.install()
    assert "constraints.txt" in str(error.value)


@pytest.mark.usefixtures("not_installed")
def test_on_a_cuda_machine_nothing_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(original: Any) -> Any:
        raise AssertionError("replaced on a machine with CUDA")

    monkeypatch.setattr(cpu, "PATCHES", (row("torch.cuda.synchronize", refuse),))
    environment = dict(os.environ)
    filters = list(logging.getLogger("megatron.core.tensor_parallel.random").filters)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not cpu.is_host()
    cpu.install()
    assert not cpu.is_host()
    assert dict(os.environ) == environment
    assert logging.getLogger("megatron.core.tensor_parallel.random").filters == filters


@pytest.mark.filterwarnings("ignore:'type' is deprecated:DeprecationWarning")
def test_host_flags_are_megatrons() -> None:
    parser = add_megatron_arguments(ArgumentParser(allow_abbrev=False))
    for typed, (dest, value) in cpu.HOST_FLAGS.items():
        assert vars(parser.parse_args(typed.split()))[dest] == value, typed
        assert vars(parser.parse_args([]))[dest] != value, f"{typed} is Megatron's default"


# The replaced functions


def test_the_device_is_the_cpu() -> None:
    assert torch.cuda.current_device() == torch.device("cpu")
    assert torch.cuda.is_available()
    assert not torch.accelerator.is_available()


@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda"), "cpu", None])
@pytest.mark.parametrize("name", ["zeros", "ones", "rand", "tensor"])
def test_factories_make_cpu_tensors_of_the_same_values(name: str, device: Any) -> None:
    shape = [1.5, 2.5] if name == "tensor" else (2, 3)
    torch.manual_seed(3)
    actual = getattr(torch, name)(shape, device=device, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(3)
    expected = getattr(torch, name)(shape, dtype=torch.float64)
    assert actual.device == torch.device("cpu")
    assert actual.requires_grad
    assert torch.equal(actual, expected)


def test_factories_leave_other_devices_alone() -> None:
    assert torch.zeros(2, device="meta").device.type == "meta"


def test_the_cuda_method_of_a_tensor_or_module_returns_it_unchanged() -> None:
    tensor, module = torch.ones(2), torch.nn.Linear(2, 2)
    assert tensor.cuda(non_blocking=True) is tensor
    assert module.cuda(0) is module
    assert module.weight.device == torch.device("cpu")


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.float32, "torch.cuda.FloatTensor"),
        (torch.bfloat16, "torch.cuda.BFloat16Tensor"),
        (torch.float16, "torch.cuda.HalfTensor"),
    ],
)
def test_type_returns_the_names_that_mixed_precision_optimizers_expect(
    dtype: torch.dtype, name: str
) -> None:
    assert torch.zeros(1, dtype=dtype).type() == name


def test_type_still_casts() -> None:
    cast = torch.ones(2).type(torch.float64)
    assert cast.dtype == torch.float64


def test_streams_and_events_have_nothing_to_wait_for() -> None:
    stream, event = torch.cuda.Stream(device="cuda"), torch.cuda.Event(enable_timing=False)
    with torch.cuda.stream(stream):
        event.record(stream)
    stream.wait_event(event)
    stream.wait_stream(torch.cuda.current_stream())
    assert stream.record_event(event) is event
    stream.record_event().wait()
    stream.synchronize()
    event.synchronize()
    torch.cuda.synchronize()


def test_memory_reports_are_zero() -> None:
    assert torch.cuda.memory_allocated() == torch.cuda.max_memory_reserved() == 0
    assert torch.cuda.memory_stats()["reserved_bytes.all.current"] == 0


def test_the_cuda_generator_is_that_of_the_cpu() -> None:
    torch.cuda.manual_seed(7)
    state, first = torch.cuda.get_rng_state(), torch.rand(4)
    torch.manual_seed(7)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(torch.rand(4), first)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(4), first)
    torch.cuda.set_rng_state(state, device="cuda")
    assert torch.equal(torch.cuda.get_rng_state(device="cuda"), state)


@pytest.mark.usefixtures("one_rank")
def test_the_rng_tracker_has_streams_of_its_own() -> None:
    tracker, outside = get_cuda_rng_tracker(), torch.get_rng_state()
    with tracker.fork():
        first = torch.rand(4)
    assert torch.equal(torch.get_rng_state(), outside)
    torch.rand(100)
    with tracker.fork():
        second = torch.rand(4)
    # Draws outside the stream do not change its numbers. Seed: 1 + 2718 + TP rank.
    stream = torch.Generator().manual_seed(2719)
    assert torch.equal(first, torch.rand(4, generator=stream))
    assert torch.equal(second, torch.rand(4, generator=stream))


@pytest.mark.usefixtures("one_rank")
def test_the_trackers_warning_is_dropped_and_no_other_message(
    caplog: pytest.LogCaptureFixture,
) -> None:
    module = logging.getLogger("megatron.core.tensor_parallel.random")
    with get_cuda_rng_tracker().fork():
        torch.rand(4)
    module.warning("CPU RNG state changed within GPU RNG context")
    assert caplog.messages == []
    module.warning("another message")
    assert caplog.messages == ["another message"]


def test_an_iteration_over_a_loader_keeps_the_generator() -> None:
    loader = torch.utils.data.DataLoader(list(range(4)), batch_size=2)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert [batch.tolist() for batch in loader] == [[0, 1], [2, 3]]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_loader_that_fails_keeps_the_generator_too() -> None:
    def fail(loader: Any) -> Any:
        torch.rand(3)
        raise RuntimeError("no iterator")

    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="no iterator"):
        cpu._keep_generator(fail)(None)
    assert torch.equal(torch.get_rng_state(), state)


def test_split_sizes_move_to_numpy() -> None:
    sizes = token_dispatcher.maybe_move_tensor_to_cpu(
        torch.tensor([3, 1]), as_numpy=True, record_stream=True
    )
    assert isinstance(sizes, numpy.ndarray)
    assert sizes.tolist() == [3, 1]
    tensor = torch.tensor([2])
    assert token_dispatcher.maybe_move_tensor_to_cpu(tensor) is tensor
    assert token_dispatcher.maybe_move_tensor_to_cpu([3, 1], as_numpy=True) == [3, 1]


def test_a_device_context_still_applies_to_wrapped_factories() -> None:
    # transformers builds models under `torch.device("meta")` before it loads their weights.
    with torch.device("meta"):
        assert torch.empty(2).is_meta
