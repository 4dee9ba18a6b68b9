"""Our C++ kernels: compiled once on the machine that runs them, for its instruction set, and kept.

Enters: the `.cpp` files beside the ops, and a C++ compiler (`$CXX`, else `c++`). Leaves: operators
in `torch.ops.megatron_sffn`, or the reason why there are none; the ops then run in plain torch.

Choices
- The library's name holds a digest of all that decides its contents, so that it is never stale. It
  lies where torch keeps extensions (`$TORCH_EXTENSIONS_DIR`, else `~/.cache/torch_extensions`).
- One process compiles while others wait; a kill leaves neither a lock nor half a library.
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
"""What torch found that the processor has -> the compiler's flags."""

FLAGS = ("-O3", "-std=c++20", "-fPIC", "-shared", "-fopenmp", "-fno-math-errno")


@functools.cache
def kernels() -> Any | None:
    """`torch.ops.megatron_sffn` with the operators of the `.cpp` files, or None."""
    try:
        torch.ops.load_library(str(_library()))
    except (OSError, subprocess.CalledProcessError) as error:
        output = getattr(error, "stderr", None) or str(error)
        reason = next((line for line in output.splitlines() if "error" in line), output.strip())
        logger.warning(
            "kernels: plain torch, slower, for those in C++ cannot be built (%s); install g++ 11 "
            "or newer, or set CXX to a compiler that knows C++20 and OpenMP",
            reason,
        )
        return None
    logger.info("kernels: C++ for %s", _instruction_set())
    return torch.ops.megatron_sffn


def _instruction_set() -> str:
    """One that we know, else DEFAULT; environment variable ATEN_CPU_CAPABILITY can lower it."""
    name = torch.backends.cpu.get_cpu_capability()
    return name if name in INSTRUCTION_SETS else "DEFAULT"


def _library() -> Path:
    """The compiled library, which is built if it is not there.

    Raises:
        OSError: no compiler, or no place to write.
        subprocess.CalledProcessError: the compiler failed.
    """
    name = _instruction_set()
    command = [os.environ.get("CXX", "c++"), *FLAGS, *INSTRUCTION_SETS[name].split()]
    # ATen's own spelling of the instruction set that its vectors shall use.
    command += [f"-DCPU_CAPABILITY={name}", f"-DCPU_CAPABILITY_{name}"]
    digest = hashlib.sha256(" ".join([*command, torch.__version__]).encode())
    for source in SOURCES:
        digest.update(source.read_bytes())
    folder = Path(
        os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    )
    library = folder / "megatron_sffn" / f"kernels-{digest.hexdigest()[:16]}.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    with library.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _compile(command, library)
    return library


def _compile(command: list[str], library: Path) -> None:
    """Run the compiler and put the library in its place."""
    logger.warning("kernels: compiling C++ for this machine, once; half a minute")
    root = Path(torch.__file__).parent
    command += [f"-I{root}/include", f"-I{root}/include/torch/csrc/api/include"]
    command += [*map(str, SOURCES), f"-L{root}/lib", "-ltorch_cpu", "-lc10"]
    with tempfile.TemporaryDirectory(dir=library.parent) as part:
        built = Path(part) / library.name
        subprocess.run([*command, "-o", str(built)], check=True, capture_output=True, text=True)
        built.replace(library)
