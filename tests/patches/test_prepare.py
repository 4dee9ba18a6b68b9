"""`prepare`: the flags that each kind of machine needs."""

import importlib.util

import pytest

from megatron_sffn import patches
from megatron_sffn.patches import cpu

APEX = set(patches.FUSED_BY_APEX.values())


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """`machine(modules, cuda=)` pretends that these modules are installed."""

    def pretend(modules: set[str], *, cuda: bool = True) -> None:
        monkeypatch.setattr(cpu, "is_host", lambda: not cuda)
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: object() if name in modules else None
        )

    return pretend


@pytest.mark.parametrize("modules", [set(), {"transformer_engine"} | APEX])
def test_without_cuda_the_cpu_trains_over_gloo(machine, modules: set[str]) -> None:
    machine(modules, cuda=False)
    defaults, line = patches.prepare()
    assert defaults["distributed_backend"] == "gloo"
    assert defaults["transformer_impl"] == "local"
    assert line.startswith("no CUDA device: training on the CPU, with --transformer-impl local")
    assert all(text in line for text in cpu.HOST_FLAGS)


def test_cuda_without_transformer_engine_keeps_nccl(machine) -> None:
    machine(set())
    defaults, line = patches.prepare()
    assert defaults["transformer_impl"] == "local"
    assert "distributed_backend" not in defaults
    assert "gloo" not in line


def test_the_fused_kernels_of_apex_are_used(machine) -> None:
    machine(APEX)
    defaults, line = patches.prepare()
    assert defaults["transformer_impl"] == "local"
    fused_flags = {"gradient_accumulation_fusion", "masked_softmax_fusion", "no_persist_layer_norm"}
    assert not fused_flags & defaults.keys()
    assert not any(text in line for text in patches.FUSED_BY_APEX)


def test_transformer_engine_alone_lacks_the_gradients_of_the_logits(machine) -> None:
    machine({"transformer_engine"})
    defaults, line = patches.prepare()
    assert defaults == {"gradient_accumulation_fusion": False}
    assert line == "no apex of NVIDIA's, with --no-gradient-accumulation-fusion"


def test_a_complete_machine_needs_nothing(machine) -> None:
    machine({"transformer_engine"} | APEX)
    assert patches.prepare() == ({}, "")
