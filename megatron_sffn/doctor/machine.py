"""Checks the disks, limits and RAM of this machine or container.

Inputs: this process, /proc, /sys and the folders that a run writes to. Outputs: a finding for each.
"""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from megatron_sffn.doctor.findings import Check, Finding, absent, ok, wrong

FREE_BYTES = 1 << 30
"""Free space that a folder needs: for a build, a data set's index or a small checkpoint."""

OPEN_FILES = 1024
"""The usual limit of a workstation; a rank opens shards, sockets to other ranks, and files of its
workers."""

PROCESSES = 1024
"""The limit counts threads, of which each rank has some tens."""

SHARED_BYTES = {True: 1 << 30, False: 60 << 20}
"""True with GPUs -> bytes that NCCL and data workers need; Docker's default is 64 MB."""

MEMORY_BYTES = 2 << 30
"""RAM of two ranks that have imported torch and Megatron."""

LIMITS = {
    "open files": (resource.RLIMIT_NOFILE, OPEN_FILES, "ulimit -n 65536"),
    "processes": (resource.RLIMIT_NPROC, PROCESSES, "ulimit -u unlimited"),
}
"""Name of the check -> limit, needed value, remedy."""


def has_gpus() -> bool:
    """True if the driver shows GPUs."""
    return any(Path("/dev").glob("nvidia[0-9]*"))


def disk(folder_of: Callable[[], Path], remedy: str, name: str) -> Finding:
    """Check that a folder can be written and has free space."""
    folder = folder_of()
    existing = next(path for path in (folder, *folder.parents) if path.is_dir())
    free = shutil.disk_usage(existing).free
    found = f"{folder}, {gigabytes(free)} free"
    try:
        with tempfile.NamedTemporaryFile(dir=existing) as file:
            file.write(bytes(4096))
    except OSError as error:
        return wrong(name, f"{found}, cannot be written ({error.strerror})", remedy)
    return ok(name, found) if free >= FREE_BYTES else wrong(name, found, remedy)


def gigabytes(size: float) -> str:
    """Bytes as text."""
    return f"{size / 1e9:.1f} GB"


def cache_folder() -> Path:
    """The folder in which torch caches extensions."""
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache")


def temporary_folder() -> Path:
    """Python's first choice of a temporary folder; if it is not writable, a fallback is used."""
    return Path(os.environ.get("TMPDIR") or "/tmp")


def limit(name: str) -> Finding:
    """A soft limit of this process."""
    kind, needed, remedy = LIMITS[name]
    soft, hard = resource.getrlimit(kind)
    found = f"{_number(soft)}, at most {_number(hard)}"
    if soft != resource.RLIM_INFINITY and soft < needed:
        return wrong(name, found, f"{remedy}; in a container: docker run --ulimit ...")
    return ok(name, found)


def _number(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else str(value)


def locked_memory(name: str) -> Finding:
    """The limit of locked memory, which InfiniBand needs."""
    soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    adapters = sorted(path.name for path in Path("/sys/class/infiniband").glob("*"))
    found = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft / 1e6:.0f} MB"
    if adapters and soft != resource.RLIM_INFINITY:
        found += f", with InfiniBand ({', '.join(adapters)})"
        return wrong(name, found, "ulimit -l unlimited; in a container: --ulimit memlock=-1")
    return ok(name, found if adapters else f"{found}, and no InfiniBand that needs it")


def core_files(name: str) -> Finding:
    """The size limit of core files."""
    soft = resource.getrlimit(resource.RLIMIT_CORE)[0]
    result = "no core file" if soft == 0 else "a core file, as large as a rank's memory"
    return ok(name, f"a crash leaves {result}")


def shared_memory(name: str) -> Finding:
    """Free space of /dev/shm, which NCCL and data workers use."""
    folder = Path("/dev/shm")
    remedy = "in a container: docker run --ipc host, or --shm-size 16g"
    if not folder.is_dir():
        return wrong(name, "no /dev/shm", remedy)
    usage = shutil.disk_usage(folder)
    found = f"/dev/shm, {gigabytes(usage.free)} of {gigabytes(usage.total)} free"
    enough = usage.free >= SHARED_BYTES[has_gpus()]
    return ok(name, found) if enough else wrong(name, found, remedy)


def memory(name: str) -> Finding:
    """Free RAM of the machine, or of the container if it has a lower limit."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    sizes = {words[0]: int(words[1]) * 1024 for words in lines}
    free, total = sizes["MemAvailable:"], sizes["MemTotal:"]
    group = Path("/sys/fs/cgroup")
    limit = group / "memory.max"
    if limit.is_file() and (text := limit.read_text().strip()) != "max":
        total = min(total, int(text))
        free = min(free, total - int((group / "memory.current").read_text()))
    found = f"{gigabytes(free)} of {gigabytes(total)} free, {len(os.sched_getaffinity(0))} cores"
    if free < MEMORY_BYTES:
        return wrong(name, found, "end other processes, or raise the container's --memory")
    return ok(name, found)


def huge_pages(name: str) -> Finding:
    """Transparent huge pages, with which large tables are read faster."""
    switch = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not switch.is_file():
        return absent(name, "not in this kernel", "none needed; large tables are read slower")
    chosen = switch.read_text().split("[")[1].split("]")[0]
    if chosen == "never":
        return absent(name, chosen, f"faster with: echo madvise > {switch}")
    return ok(name, chosen)


CHECKS: dict[str, Check] = {
    "disk: here": partial(disk, Path.cwd, "work in a folder with room, or give another --save"),
    "disk: cache": partial(disk, cache_folder, "set TORCH_EXTENSIONS_DIR to a folder with room"),
    "disk: temporary": partial(disk, temporary_folder, "set TMPDIR to a folder with room"),
    **dict.fromkeys(LIMITS, limit),
    "locked memory": locked_memory,
    "core files": core_files,
    "shared memory": shared_memory,
    "memory": memory,
    "huge pages": huge_pages,
}
"""Name -> check, in the order of the table."""
