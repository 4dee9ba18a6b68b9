"""The doctor runs as a process, in this environment and in broken ones."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_sffn.doctor import __main__ as doctor
from megatron_sffn.doctor import findings, machine, packages, smoke
from megatron_sffn.doctor.findings import ABSENT, OK, WRONG, guarded
from tests.support.paths import ROOT

Lines = dict[str, dict[str, str]]


def run(*flags: str, preexec: Callable[[], None] | None = None, **environment: str) -> Any:
    """Run the command with additional environment variables."""
    return subprocess.run(
        [sys.executable, "-m", "megatron_sffn.doctor", *flags],
        cwd=ROOT,
        env={**os.environ, **environment},
        preexec_fn=preexec,
        capture_output=True,
        text=True,
    )


def lines_of(process: Any) -> Lines:
    """Name -> line in the output of `--json`."""
    return {line["name"]: line for line in json.loads(process.stdout)["checks"]}


@pytest.fixture(scope="module")
def full_run() -> Any:
    """All checks, in this environment."""
    return run("--json")


def test_all_checks_pass_in_this_environment(full_run: Any) -> None:
    assert full_run.returncode == 0, full_run.stdout
    assert json.loads(full_run.stdout)["ready"] is True
    lines = lines_of(full_run)
    assert list(lines) == [*packages.CHECKS, *machine.CHECKS, "smoke test"]
    assert {line["state"] for line in lines.values()} <= {OK, ABSENT}
    for line in lines.values():
        assert bool(line["remedy"]) is (line["state"] != OK), line
    for name in ("Python", "requirements", "torch", "collectives", "Megatron", "Triton", "memory"):
        assert lines[name]["state"] == OK, lines[name]


def test_the_smoke_test_trains_on_two_ranks(full_run: Any) -> None:
    finding = lines_of(full_run)["smoke test"]["found"]
    assert "a sum, and 2 steps of a sparse model, validation loss 4." in finding


def test_hanging_ranks_fail_the_smoke_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smoke, "SECONDS", 1)
    line = smoke.smoke("smoke test")
    assert (line.state, line.found) == (WRONG, "2 ranks did not end within 1 s")


def test_failing_ranks_fail_the_smoke_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-network")
    line = smoke.smoke("smoke test")
    assert line.state == WRONG
    assert "no-network" in line.found


def test_the_table_has_a_line_for_each_check_and_its_remedy_below() -> None:
    checks = [
        findings.ok("torch", "2.13"),
        findings.absent("apex", "not installed", "none needed"),
        findings.wrong("open files", "64", "ulimit -n 65536"),
    ]
    assert doctor.table(checks) == (
        "check       state   found\n"
        "torch       ok      2.13\n"
        "apex        absent  not installed\n"
        "                    -> none needed\n"
        "open files  wrong   64\n"
        "                    -> ulimit -n 65536"
    )


# Broken packages, in folders that come first in the path


def install(site: Path, name: str, version: str, modules: dict[str, str]) -> None:
    """Install a distribution into a folder."""
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    for path, text in modules.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_text(text)


EMPTY_TE = (
    "raise RuntimeError('Found empty `transformer-engine` meta package installed. Install "
    "`transformer-engine` with framework extensions')\n"
)
"""The error of Transformer Engine without its torch part."""


def test_broken_packages_are_reported_in_the_table(tmp_path: Path) -> None:
    install(tmp_path, "transformer-engine", "2.9.0", {"transformer_engine/__init__.py": EMPTY_TE})
    install(tmp_path, "apex", "0.9.10", {"apex/__init__.py": "", "apex/interfaces.py": ""})
    install(tmp_path, "ray", "1.0", {})  # pip has left only the metadata
    process = run("--no-smoke", PYTHONPATH=str(tmp_path))
    assert process.returncode == 1
    lines = {line[:18].strip(): line for line in process.stdout.splitlines()}
    assert "wrong   2.9.0, half-installed, without its torch part (" in process.stdout
    assert "Found empty `transformer-engine` meta package" in lines["Transformer Engine"]
    assert (
        '-> pip install --no-build-isolation "transformer-engine[pytorch]==2.9.0"' in process.stdout
    )
    assert "wrong   0.9.10, not NVIDIA's: a package of the index" in lines["apex"]
    assert "-> pip uninstall apex; " in process.stdout
    # Without the doctor, a user would see only this error.
    assert "wrong   0.19" in lines["Megatron"]
    assert "RuntimeError: Found empty `transformer-engine`" in lines["Megatron"]
    assert process.stdout.splitlines()[-1] == "wrong here: Transformer Engine, apex, Megatron"


def test_training_with_a_broken_package_names_it_and_the_doctor(tmp_path: Path) -> None:
    install(tmp_path, "transformer-engine", "2.9.0", {"transformer_engine/__init__.py": EMPTY_TE})
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "megatron_sffn.pretrain"]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 2
    assert process.stderr.splitlines()[-1].startswith(
        "error: megatron cannot be imported (Found empty `transformer-engine` meta package"
    )
    assert "python -m megatron_sffn.doctor says which package to mend" in process.stderr


def test_other_checks_run_if_torch_cannot_be_imported(tmp_path: Path) -> None:
    broken = "raise ImportError('libcudart.so.13: cannot open shared object file')\n"
    install(tmp_path, "torch", "2.1.0", {"torch/__init__.py": broken})
    process = run("--json", PYTHONPATH=str(tmp_path))
    assert process.returncode == 1
    lines = lines_of(process)
    assert lines["torch"]["state"] == WRONG
    assert lines["torch"]["found"] == (
        "2.1.0, ImportError: libcudart.so.13: cannot open shared object file"
    )
    assert "torch 2.1.0 is not >=2.9" in lines["requirements"]["found"]
    assert lines["GPUs"]["remedy"] == "mend torch first"
    assert "libcudart" in lines["Megatron"]["found"]
    assert lines["smoke test"]["found"] == "not run"
    assert lines["gigatoken"]["state"] == OK


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that comes first in the path of this process and of its children."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def test_a_complete_transformer_engine_is_ok_and_a_broken_one_wrong(site: Path) -> None:
    modules = {"transformer_engine/__init__.py": "", "transformer_engine/pytorch.py": ""}
    install(site, "transformer-engine", "2.9.0", modules)
    install(site, "transformer-engine-torch", "2.9.0", {})
    finding = packages.transformer_engine("Transformer Engine")
    assert (finding.state, finding.found) == (OK, "2.9.0, with its torch part")
    (site / "transformer_engine" / "pytorch.py").write_text("import nothing_of_this_name\n")
    finding = packages.transformer_engine("Transformer Engine")
    assert (finding.state, "cannot be imported (ModuleNotFoundError" in finding.found) == (
        WRONG,
        True,
    )


def test_parts_of_two_versions_of_transformer_engine_are_reported(site: Path) -> None:
    install(site, "transformer-engine", "2.9.0", {"transformer_engine/__init__.py": EMPTY_TE})
    install(site, "transformer-engine-torch", "2.8.0", {})
    finding = packages.transformer_engine("Transformer Engine")
    assert finding.state == WRONG
    expected = "2.9.0, but transformer-engine-torch 2.8.0: parts of two versions ("
    assert finding.found.startswith(expected)


def test_nvidias_apex_needs_its_extensions(site: Path) -> None:
    install(site, "apex", "0.1", {"apex/__init__.py": "", "apex/multi_tensor_apply/a.py": ""})
    finding = packages.apex("apex")
    assert (finding.state, finding.found) == (WRONG, "0.1, NVIDIA's, without its CUDA extensions")
    (site / "amp_C.py").write_text("")
    assert packages.apex("apex").state == OK


def test_a_broken_dali_is_wrong(site: Path) -> None:
    install(site, "nvidia-dali-cuda130", "9.9", {"nvidia/dali/__init__.py": "raise OSError('x')\n"})
    (site / "nvidia" / "__init__.py").write_text("")
    finding = packages.dali("DALI")
    assert (finding.state, finding.found) == (WRONG, "nvidia-dali-cuda130 9.9, OSError: x")


def test_only_supported_python_versions_are_ok(monkeypatch: pytest.MonkeyPatch) -> None:
    for version, state in (((3, 11), WRONG), ((3, 12), OK), ((3, 13), OK), ((3, 14), WRONG)):
        monkeypatch.setattr(sys, "version_info", (*version, 0))
        assert packages.python("Python").state == state


def test_missing_requirements_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = ["not-there-at-all", "torch>=99", 'not-there; extra == "dev"', "numpy"]
    monkeypatch.setattr("importlib.metadata.requires", lambda name: needed)
    finding = packages.requirements("requirements")
    assert finding.state == WRONG
    assert finding.found.startswith("not-there-at-all is missing, torch ")
    assert finding.found.endswith("is not >=99")


# Missing parts of a machine


GPU = {"name": "NVIDIA H100", "bytes": 80 << 30, "capability": [9, 0]}
BUILD = {"version": "2.13", "cuda": "13.0", "available": True, "gpus": [GPU] * 8, "gloo": True}
BUILD |= {"nccl": "2.29.7", "architectures": ["sm_80", "sm_90"]}


@pytest.mark.parametrize(
    ("check", "changes", "driver", "state", "expected"),
    [
        (packages.cuda, {}, "580.65", OK, "driver 580.65, CUDA 13.0 of torch"),
        (packages.cuda, {"available": False}, None, ABSENT, "no NVIDIA driver"),
        (packages.cuda, {"available": False}, "470.1", WRONG, "driver 470.1, but torch, built"),
        (packages.gpus, {}, "", OK, "8 x NVIDIA H100 (80 GiB, compute capability 9.0)"),
        (packages.gpus, {"gpus": []}, "", ABSENT, "none"),
        (packages.gpus, {"architectures": ["sm_75"]}, "", WRONG, "8 x NVIDIA H100"),
        (packages.collectives, {}, "", OK, "gloo, NCCL 2.29.7"),
        (packages.collectives, {"gloo": False}, "", WRONG, "NCCL 2.29.7"),
        (packages.collectives, {"nccl": None}, "", WRONG, "gloo"),
        (packages.collectives, {"nccl": None, "gpus": []}, "", OK, "gloo"),
    ],
)
def test_checks_of_gpus_follow_the_build_of_torch(
    monkeypatch, check: Any, changes: Any, driver: str | None, state: str, expected: str
) -> None:
    monkeypatch.setattr(packages, "torch_build", lambda: {**BUILD, **changes})
    monkeypatch.setattr(packages, "driver_version", lambda: driver)
    line = check("name")
    assert line.state == state
    assert line.found.startswith(expected)


def test_a_missing_or_failing_compiler_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-compiler")
    finding = packages.kernels("C++ kernels")
    assert (finding.state, "no compiler (no-compiler)" in finding.found) == (ABSENT, True)
    compiler = tmp_path / "cxx"
    compiler.write_text(
        "#!/bin/sh\n[ $1 = --version ] && echo one && exit\necho 'error: old' >&2\nexit 1\n"
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    finding = packages.kernels("C++ kernels")
    assert (finding.state, "cannot be built (error: old)" in finding.found) == (WRONG, True)


def test_a_failing_check_becomes_a_line() -> None:
    line = guarded("name", lambda name: 1 / 0)  # type: ignore[arg-type, return-value]
    assert line.state == WRONG
    assert line.found == "cannot be looked at (ZeroDivisionError: division by zero)"


# Limits and disks


def test_a_low_limit_of_open_files_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def lower_limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))

    # Only one check of the machine runs, which is fast.
    code = "from megatron_sffn.doctor import machine; print(machine.limit('open files'))"
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        preexec_fn=lower_limit,
        capture_output=True,
        text=True,
    )
    assert "state='wrong', found='256, at most 256', remedy='ulimit -n 65536; " in process.stdout


@pytest.fixture
def full_disk(tmp_path: Path) -> Any:
    """A full file system."""
    if os.getuid() != 0:
        pytest.skip("mounting a file system needs root")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("this container cannot mount")
    try:
        (tmp_path / "filling").write_bytes(bytes(1 << 20))
        yield tmp_path
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_full_disk_is_wrong(full_disk: Path) -> None:
    line = machine.disk(lambda: full_disk, "set TMPDIR", "disk: temporary")
    assert line.state == WRONG
    assert "0.0 GB free, cannot be written (No space left on device)" in line.found


def test_a_missing_folder_is_checked_by_its_parent(tmp_path: Path) -> None:
    assert machine.disk(lambda: tmp_path / "new" / "newer", "remedy", "name").state == OK


@pytest.mark.parametrize("flags", [["--nonsense"], ["there"]])
def test_bad_input_is_reported_in_one_sentence(flags: list[str]) -> None:
    process = run(*flags)
    assert process.returncode == 2
    assert process.stderr.startswith("error: ")
    assert process.stderr.count("\n") == 1
    assert process.stdout == ""
