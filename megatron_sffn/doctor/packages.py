"""Checks Python, torch, Megatron and the optional packages: installed, complete, compatible.

Inputs: the environment. Outputs: a finding for each.

Design notes: the metadata and folders of a package are read first; only then is the package
imported, in another process.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import threading
from functools import cache, partial
from pathlib import Path
from typing import Any

from megatron_sffn.doctor.findings import (
    Check,
    Finding,
    ProbeError,
    absent,
    ok,
    probe,
    wrong,
)

PYTHON = ((3, 12), (3, 14))
"""The first version that works, and the first that does not: megatron-core 0.19 has wheels for the
versions in between."""

INSTALL = "pip install -c constraints.txt megatron-sffn, with the constraints.txt of the clone"

APEX_OF_NVIDIA = "multi_tensor_apply"
"""A folder of NVIDIA's apex that the package `apex` on PyPI lacks."""

TRANSFORMER_ENGINE_PARTS = (
    "transformer-engine-torch",
    "transformer-engine-cu12",
    "transformer-engine-cu13",
)
"""Distributions that need the same version as transformer-engine."""

EXTRAS = {
    "emerging_optimizers": ("muon", "--optimizer muon"),
    "matplotlib": ("plot", "pictures of reports"),
    "gigatoken": ("fast", "faster tokenizing"),
    "ray": ("ray", "preprocessing on a cluster"),
    "rensa": ("dedup", "near duplicates"),
    "nltk": ("sentences", "--split-sentences"),
    "scipy": ("study", "the report of a study"),
    "submitit": ("slurm", "studies on Slurm"),
    "lm_eval": ("eval", "--tasks of eval"),
    "mamba_ssm": ("mamba", "recurrent layers on a GPU"),
    "wandb": ("wandb", "--wandb-project"),
}
"""Package -> our extra that installs it, and its use."""


def python(name: str) -> Finding:
    """The version of this interpreter."""
    first, end = PYTHON
    found = f"{sys.version.split()[0]}, {sys.executable}"
    if first <= sys.version_info[:2] < end:
        return ok(name, found)
    return wrong(name, found, "install Python 3.12 or 3.13, then megatron-sffn into it")


def requirements(name: str) -> Finding:
    """Check that all required packages are installed in the required versions."""
    try:
        needed = importlib.metadata.requires("megatron-sffn") or []
    except importlib.metadata.PackageNotFoundError:
        return absent(name, "not known: megatron-sffn is here, but not installed", INSTALL)
    from packaging.requirements import Requirement

    problems, count = [], 0
    for requirement in map(Requirement, needed):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        count += 1
        version = version_of(requirement.name)
        if version is None:
            problems.append(f"{requirement.name} is missing")
        elif not requirement.specifier.contains(version, prereleases=True):
            problems.append(f"{requirement.name} {version} is not {requirement.specifier}")
    if problems:
        return wrong(name, ", ".join(problems), INSTALL)
    return ok(name, f"{count} packages, megatron-core {version_of('megatron-core')}")


def version_of(package: str) -> str | None:
    """The version of a distribution; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def torch_build() -> dict[str, Any]:
    """The result of `probes.torch`.

    Raises:
        ProbeError: if torch cannot be imported.
    """
    with _PROBE_LOCK:
        answer = _torch_answer()
    if isinstance(answer, ProbeError):
        raise answer
    return answer


_PROBE_LOCK = threading.Lock()


@cache
def _torch_answer() -> dict[str, Any] | ProbeError:
    try:
        return probe("torch")
    except ProbeError as error:
        return error


def torch(name: str) -> Finding:
    """Check that torch can be imported."""
    try:
        build = torch_build()
    except ProbeError as error:
        return _broken(name, "torch", error, f"pip uninstall torch, then {INSTALL}")
    cuda = f"built for CUDA {build['cuda']}" if build["cuda"] else "built without CUDA"
    return ok(name, f"{build['version']}, {cuda}")


def _broken(name: str, package: str, error: ProbeError, remedy: str) -> Finding:
    """The finding about a required package that is missing or cannot be imported."""
    version = version_of(package)
    if version is None:
        return wrong(name, "not installed", INSTALL)
    return wrong(name, f"{version}, {error}", remedy)


def cuda(name: str) -> Finding:
    """Check that torch's CUDA works with the driver."""
    driver = driver_version()
    build = torch_build()
    if build["available"]:
        return ok(name, f"driver {driver or 'present'}, CUDA {build['cuda']} of torch")
    if driver is None:
        return absent(
            name,
            "no NVIDIA driver: training runs on the CPU",
            "on a GPU machine install the driver; in a container: docker run --gpus all",
        )
    return wrong(
        name,
        f"driver {driver}, but torch, built for CUDA {build['cuda']}, sees no GPU",
        "update the driver to one of that CUDA (nvidia-smi shows its own), or install a torch that "
        "is built for the driver's; or unset CUDA_VISIBLE_DEVICES",
    )


def driver_version() -> str | None:
    """The version of NVIDIA's kernel driver; None if there is none."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.splitlines()[0] if result.returncode == 0 and result.stdout else None


def gpus(name: str) -> Finding:
    """The GPUs, and whether this torch has code for them."""
    build = torch_build()
    if not build["gpus"]:
        return absent(name, "none: training runs on the CPU", "none needed to try things")
    known = {int(arch.split("_")[1]) // 10 for arch in build["architectures"] if "sm_" in arch}
    unsupported = [gpu["name"] for gpu in build["gpus"] if gpu["capability"][0] not in known]
    names = [
        f"{gpu['name']} ({gpu['bytes'] / 2**30:.0f} GiB, compute capability "
        f"{'.'.join(map(str, gpu['capability']))})"
        for gpu in build["gpus"]
    ]
    found = ", ".join(f"{names.count(gpu)} x {gpu}" for gpu in dict.fromkeys(names))
    if unsupported:
        return wrong(name, found, f"install a torch with code for {', '.join(set(unsupported))}")
    return ok(name, found)


def collectives(name: str) -> Finding:
    """The backends for collective operations."""
    build = torch_build()
    backends = ["gloo"] if build["gloo"] else []
    backends += [f"NCCL {build['nccl']}"] if build["nccl"] else []
    found = ", ".join(backends) or "neither gloo nor NCCL"
    if not build["gloo"]:
        return wrong(name, found, "install a torch with gloo, such as the index's")
    if build["gpus"] and not build["nccl"]:
        return wrong(name, found, "install a torch with NCCL, such as the index's")
    return ok(name, found)


def megatron(name: str) -> Finding:
    """Check that Megatron and its training loop can be imported."""
    try:
        probe("megatron")
    except ProbeError as error:
        remedy = f"mend what is wrong above, such as Transformer Engine or apex; else {INSTALL}"
        return _broken(name, "megatron-core", error, remedy)
    return ok(name, f"{version_of('megatron-core')}, with its training loop")


def transformer_engine(name: str) -> Finding:
    """Check that Transformer Engine is complete or absent: a part of it breaks `megatron.core`."""
    version = version_of("transformer-engine")
    if version is None and importlib.util.find_spec("transformer_engine") is None:
        remedy = 'on a GPU machine: pip install --no-build-isolation "megatron-sffn[te]"'
        return absent(name, "not installed: Megatron's own modules compute", remedy)
    try:
        probe("transformer_engine")
    except ProbeError as error:
        version_of_part = {part: version_of(part) for part in TRANSFORMER_ENGINE_PARTS}
        mismatched = [
            f"{part} {number}"
            for part, number in version_of_part.items()
            if number not in (None, version)
        ]
        if mismatched:
            found = f"{version}, but {', '.join(mismatched)}: parts of two versions ({error})"
        elif version_of_part["transformer-engine-torch"] is None:
            found = f"{version}, half-installed, without its torch part ({error})"
        else:
            found = f"{version}, cannot be imported ({error})"
        return wrong(
            name,
            found,
            f'pip install --no-build-isolation "transformer-engine[pytorch]=={version}", or pip '
            "uninstall transformer-engine; Megatron cannot be imported before",
        )
    return ok(name, f"{version}, with its torch part")


def apex(name: str) -> Finding:
    """Check that apex is NVIDIA's and not another package of the same name."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return absent(
            name,
            "not installed: torch's Adam and norms compute",
            "NGC's PyTorch image has it; never pip install apex, which is another package",
        )
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    version = version_of("apex")
    if not any((folder / APEX_OF_NVIDIA).is_dir() for folder in folders):
        return wrong(
            name,
            f"{version}, not NVIDIA's: a package of the index with the same name",
            "pip uninstall apex; Megatron would choose its norms and fail",
        )
    if importlib.util.find_spec("amp_C") is None:
        return wrong(
            name,
            f"{version}, NVIDIA's, without its CUDA extensions",
            "build it with them (--cpp_ext --cuda_ext), or pip uninstall apex",
        )
    return ok(name, f"{version}, NVIDIA's, with its CUDA extensions")


def dali(name: str) -> Finding:
    """Check that NVIDIA DALI can be imported."""
    distributions = [
        f"{dist.metadata['Name']} {dist.version}"
        for dist in importlib.metadata.distributions()
        if (dist.metadata["Name"] or "").startswith("nvidia-dali-cuda")
    ]
    if not distributions:
        remedy = 'for --sffn-dataloader dali: pip install "megatron-sffn[dali]"'
        return absent(name, "not installed", remedy)
    try:
        probe("dali")
    except ProbeError as error:
        return wrong(
            name,
            f"{distributions[0]}, {error}",
            f"pip install --force-reinstall {distributions[0]}",
        )
    return ok(name, distributions[0])


def triton(name: str, on_gpu: bool = True) -> Finding:
    """Check that a kernel compiles and runs; without a GPU, in Triton's interpreter."""
    if importlib.util.find_spec("triton") is None:
        return absent(name, "not installed", f"for --sffn-backend triton: {INSTALL}")
    compiled = torch_build()["available"] and on_gpu
    try:
        answer = probe("triton", **({} if compiled else {"TRITON_INTERPRET": "1"}))
    except ProbeError as error:
        remedy = "install gcc, with which Triton builds its launcher, and check TRITON_CACHE_DIR"
        return wrong(name, f"{version_of('triton')}, {error}", remedy)
    device = "on the GPU" if compiled else "in the interpreter"
    return ok(name, f"{answer['version']}, a kernel ran {device}")


def kernels(name: str) -> Finding:
    """Check that our C++ kernels for the CPU can be built."""
    compiler = os.environ.get("CXX", "c++")
    remedy = "install g++ 11 or newer, or set CXX to a compiler that knows C++20 and OpenMP"
    try:
        command = [*compiler.split(), "--version"]
        printed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return absent(name, f"no compiler ({compiler}): plain torch computes on a CPU", remedy)
    compiler_name = printed.stdout.splitlines()[0]
    torch_build()
    try:
        answer = probe("kernels")
    except ProbeError as error:
        return wrong(name, f"{compiler_name}; {error}", remedy)
    if not answer["loaded"]:
        return wrong(name, answer["message"].split(";")[0], remedy)
    origin = "built now" if answer["built"] else "cached"
    return ok(
        name, f"{answer['message'].replace('using C++ kernels', 'C++')}, {origin}; {compiler_name}"
    )


def extra(package: str, name: str) -> Finding:
    """Check if an optional package is installed."""
    version = version_of(package)
    if version is not None and importlib.util.find_spec(package) is not None:
        return ok(name, version)
    extra_name, use = EXTRAS[package]
    return absent(name, "not installed", f'for {use}: pip install "megatron-sffn[{extra_name}]"')


CHECKS: dict[str, Check] = {
    "Python": python,
    "requirements": requirements,
    "torch": torch,
    "CUDA": cuda,
    "GPUs": gpus,
    "collectives": collectives,
    "Transformer Engine": transformer_engine,
    "apex": apex,
    "Megatron": megatron,
    "DALI": dali,
    "Triton": triton,
    "C++ kernels": kernels,
    **{package: partial(extra, package) for package in EXTRAS},
}
"""Name -> check, in the order of the table."""
