"""What each kind of machine needs, decided once."""

import importlib.util

import pytest

from megatron_sffn import platforms
from megatron_sffn.platforms import cpu


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """`machine(cuda=, transformer_engine=)` pretends."""

    def pretend(*, cuda: bool, transformer_engine: bool) -> None:
        monkeypatch.setattr(cpu, "is_host", lambda: not cuda)
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: object() if transformer_engine else None
        )

    return pretend


def test_without_cuda_the_cpu_trains_over_gloo(machine) -> None:
    machine(cuda=False, transformer_engine=False)
    defaults, line = platforms.prepare()
    assert defaults["distributed_backend"] == "gloo"
    assert defaults["transformer_impl"] == "local"
    assert line.startswith("no CUDA device: training on the CPU, with --transformer-impl local")
    assert all(text in line for text in cpu.HOST_FLAGS)


def test_cuda_without_transformer_engine_keeps_nccl(machine) -> None:
    machine(cuda=True, transformer_engine=False)
    defaults, line = platforms.prepare()
    assert defaults["transformer_impl"] == "local"
    assert "distributed_backend" not in defaults
    assert "gloo" not in line


def test_a_complete_machine_needs_nothing(machine) -> None:
    machine(cuda=True, transformer_engine=True)
    assert platforms.prepare() == ({}, "")
