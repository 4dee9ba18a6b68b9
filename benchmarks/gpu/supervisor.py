"""Run the sections of a command, each in its own process with a time limit.

Inputs: a plan, a folder, seconds. Outputs: results.json after every section, log.txt, and a line on
stdout as each section starts and ends.

Design notes:
- A section gets its share of the remaining time: what an early section does not use goes to the
  later ones, and if time runs short, all of them shrink alike. The total is never exceeded.
- A process stops by itself at its limit, between two cases. After `GRACE` more seconds it is
  killed, with all processes that it started.
- A process that dies (a failed device assertion, a signal) is restarted without the cases that it
  has begun, so that one bad case costs only itself.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu import results
from benchmarks.gpu.plan import PLANS, Section, share
from benchmarks.gpu.worker import NEXT, POISONED, note
from benchmarks.machine import ROOT
from megatron_sffn.utils.errors import reason_in

GRACE = 8.0
"""Seconds between the time limit of the cases and the kill of their process."""

RESERVE = 3.0
"""Seconds reserved at the end, in which results are written and printed."""

MOST_STARTS = 12
"""Most starts of a section whose cases end its process."""

LEAST = 2.0
"""A section with fewer seconds is not started."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """The arguments of the command line.

    Args:
        name: a key of `PLANS`.
        out: the folder of the results, which exists.
        seconds: limit of the whole command.
        dry: True to run without a GPU.
        only: names of the sections to run; all of the plan if it is empty.
    """

    name: str
    out: Path
    seconds: float
    dry: bool
    only: tuple[str, ...] = ()


def run(command: Command) -> dict[str, Any]:
    """Run all sections; return the entries of this command in results.json."""
    deadline = time.monotonic() + command.seconds - RESERVE
    sections = [s for s in PLANS[command.name] if not command.only or s.name in command.only]
    store = results.Store(command.out / "results.json", command.name, dry=command.dry)
    log = command.out / "log.txt"
    for number, section in enumerate(sections):
        limit = share(tuple(sections[number:]), deadline - time.monotonic())
        if limit < LEAST:
            store.add(section.name, results.not_started())
        else:
            print(f"  {section.name:12} starts, at most {limit:.0f} s", flush=True)
            with tempfile.TemporaryDirectory(prefix="sffn-gpu-") as scratch:
                store.add(section.name, _run_section(section, command, limit, Path(scratch), log))
        print(results.line(section.name, store.sections[section.name]), flush=True)
    return store.sections


def _run_section(
    section: Section, command: Command, limit: float, scratch: Path, log: Path
) -> dict[str, Any]:
    """Run one section with its restarts; return its entry of results.json."""
    start = time.monotonic()
    records, reason = scratch / "records.jsonl", ""
    for _ in range(MOST_STARTS):
        seconds_left = limit - (time.monotonic() - start)
        if seconds_left < LEAST:
            reason = "its time was up before all cases had begun"
            break
        begun_before = len(results.begun(results.read_lines(records)))
        code, last_output = _process(section, command, seconds_left, scratch, log)
        if code == 0:
            reason = ""
            break
        reason = f"its process was started {MOST_STARTS} times, and not again"
        if code in (NEXT, POISONED):
            continue
        reason = f"its process ended with {_name(code)}: {last_output}"
        _close(records, reason)
        if code is None or len(results.begun(results.read_lines(records))) <= begun_before:
            break
    return results.entry(results.read_lines(records), reason, time.monotonic() - start)


def _process(
    section: Section, command: Command, seconds: float, scratch: Path, log: Path
) -> tuple[int | None, str]:
    """Run the process once; return its exit code, None if it was killed, and its last output."""
    grace = min(GRACE, seconds / 4)
    arguments = [sys.executable, "-m", "benchmarks.gpu.worker", section.name]
    arguments += ["--out", str(command.out.resolve()), "--scratch", str(scratch)]
    arguments += [
        "--records",
        str(scratch / "records.jsonl"),
        "--seconds",
        f"{seconds - grace:.1f}",
    ]
    arguments += ["--isolated"] * section.isolated + ["--dry-run"] * command.dry
    with log.open("a", encoding="utf-8") as file:
        file.write(f"\n==== {command.name} {section.name}, at most {seconds:.0f} s\n")
        file.flush()
        begin = file.tell()
        process = subprocess.Popen(
            arguments,
            cwd=ROOT,
            env=environment(command.dry),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        with _ended(process):
            try:
                code: int | None = process.wait(timeout=seconds)
            except subprocess.TimeoutExpired:
                code = None
    with log.open(encoding="utf-8", errors="replace") as file:
        file.seek(begin)
        return code, "" if code == 0 else reason_in(file.read())[:300]


@contextlib.contextmanager
def _ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Kill a process and all processes that it started when the block ends."""
    try:
        yield
    finally:
        # Kill the whole process group, because a training may have outlived its leader.
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, number)
                if process.poll() is None and number == signal.SIGTERM:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(timeout=2)
        process.wait()


def environment(dry: bool) -> dict[str, str]:
    """The environment variables of a section's process and its children."""
    variables = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONUNBUFFERED": "1"}
    variables["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), *filter(None, [variables.get("PYTHONPATH")])]
    )
    # Remove TRITON_INTERPRET of the shell, because kernels on a GPU are compiled.
    variables.pop("TRITON_INTERPRET", None)
    if dry:
        # Without a compiler the C++ kernels are not built; a GPU never runs them.
        variables |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "CXX": "no-compiler"}
        variables["TORCH_EXTENSIONS_DIR"] = str(Path(tempfile.gettempdir()) / "sffn-no-extensions")
    return variables


def _close(records: Path, reason: str) -> None:
    """Record that the case that began last has failed, if it has no result."""
    lines = results.read_lines(records)
    ended = {line["case"] for line in lines if "case" in line}
    for name in sorted(results.begun(lines) - ended):
        note(records, {"case": name, "state": "failed", "reason": reason, "seconds": 0})


def _name(code: int | None) -> str:
    """A description of how a process ended."""
    if code is None:
        return "its time"
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
