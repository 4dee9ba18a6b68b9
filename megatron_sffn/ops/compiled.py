"""Build our C++ kernels at the first use, for the instruction set of this machine, and cache them.

Inputs: the `.cpp` files of the ops, and a C++ compiler (`$CXX`, else `c++`). Outputs: operators in
`torch.ops.megatron_sffn`. Without a compiler the ops fall back to plain torch, with a warning.

Design notes:
- The name of the library contains a digest of the sources, the compiler's command and the version
  of torch, so a cached library is never stale. It is cached where torch caches extensions
  (`$TORCH_EXTENSIONS_DIR`, else `~/.cache/torch_extensions`).
- One process compiles while the others wait for a file lock, which the kernel releases if the
  process is killed. The library is an atomic write: it is renamed into place when it is complete.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import logging
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

SOURCES = sorted(Path(__file__).parent.glob("*/*.cpp"))

INSTRUCTION_SETS = {
    "AVX512": "-mavx512f -mavx512dq -mavx512vl -mavx512bw -mfma",
    "AVX2": "-mavx2 -mfma -mf16c",
    "DEFAULT": "",
}
"""The instruction set that torch detected -> compiler flags."""

FLAGS = ("-O3", "-std=c++20", "-fPIC", "-shared", "-fopenmp", "-fno-math-errno")


@functools.cache
def kernels() -> Any | None:
    """`torch.ops.megatron_sffn` with the operators of the `.cpp` files; None if the build fails."""
    try:
        torch.ops.load_library(str(_built_library()))
    except (OSError, subprocess.CalledProcessError) as error:
        output = getattr(error, "stderr", None) or str(error)
        reason = next((line for line in output.splitlines() if "error" in line), output.strip())
        logger.warning(
            "C++ kernels cannot be built (%s); using plain torch, which is slower. Install g++ 11 "
            "or newer, or set CXX to a compiler that knows C++20 and OpenMP.",
            reason,
        )
        return None
    logger.info("using C++ kernels for %s", _instruction_set())
    return torch.ops.megatron_sffn


def _instruction_set() -> str:
    """A key of `INSTRUCTION_SETS`; the environment variable ATEN_CPU_CAPABILITY can lower it."""
    name = torch.backends.cpu.get_cpu_capability()
    return name if name in INSTRUCTION_SETS else "DEFAULT"


def library_path() -> Path:
    """The path of the library for this machine, whether it is built or not."""
    digest = hashlib.sha256(" ".join([*_command(), torch.__version__]).encode())
    for source in SOURCES:
        digest.update(source.read_bytes())
    folder = Path(
        os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    )
    return folder / "megatron_sffn" / f"kernels-{digest.hexdigest()[:16]}.so"


def _command() -> list[str]:
    """The compiler and the flags for the instruction set of this machine."""
    name = _instruction_set()
    command = [os.environ.get("CXX", "c++"), *FLAGS, *INSTRUCTION_SETS[name].split()]
    # ATen's headers choose the width of `Vectorized` by these macros.
    return [*command, f"-DCPU_CAPABILITY={name}", f"-DCPU_CAPABILITY_{name}"]


def _built_library() -> Path:
    """The path of the library, built first if it is not in the cache.

    Raises:
        OSError: if there is no compiler, or the cache folder cannot be written.
        subprocess.CalledProcessError: if the compiler fails.
    """
    library = library_path()
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    with library.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Another process may have built it while this one waited for the lock.
        if not library.exists():
            _compile(_command(), library)
    return library


def _compile(command: list[str], library: Path) -> None:
    """Run the compiler, then move the library into place."""
    logger.warning("compiling C++ kernels for this machine, once; this takes half a minute")
    root = Path(torch.__file__).parent
    command += [f"-I{root}/include", f"-I{root}/include/torch/csrc/api/include"]
    command += [*map(str, SOURCES), f"-L{root}/lib", "-ltorch_cpu", "-lc10"]
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        built = Path(scratch) / library.name
        subprocess.run([*command, "-o", str(built)], check=True, capture_output=True, text=True)
        built.replace(library)
