"""The process of one section: `python -m benchmarks.gpu.worker SECTION ...`.

Inputs: the name of a section, and a file of JSON lines that a former process of the section may
have begun. Outputs: lines appended to that file: the names of all cases; then two per case, one as
it begins and one with its result. The file is correct at any time, even if this process is killed.

Design notes: a case that the file has begun is not run again, so that the supervisor can restart a
section after a case has ended its process. After an error of CUDA itself the process exits with
`POISONED`, because every later call would fail too. It also exits after a case that has taken half
of the section's time, so that the other cases get theirs.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

POISONED = 71
"""Exit code: CUDA cannot be used any more in this process."""

NEXT = 72
"""Exit code: the next case needs a fresh process."""

LONGEST_CASE = 0.5
"""Share of the section's time after which a case is stopped."""

TRITON = "Triton Error [CUDA]"
"""The beginning of a CUDA error from Triton's launcher."""

HARMLESS = ("out of resource", "invalid argument", "out of memory")
"""Errors of a launch that was refused; later launches can succeed."""

LONGEST_SENTENCE = 300
"""Most characters of a reason in the results; log.txt has all of it."""


def main() -> int:
    """Run the cases that have not begun."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.worker", allow_abbrev=False)
    parser.add_argument("section")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--records", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--isolated", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    deadline = time.monotonic() + args.seconds

    from benchmarks.gpu import results
    from benchmarks.gpu.case import Case, Context
    from megatron_sffn.utils.warning_filters import silence

    silence()
    # Warnings go to log.txt; none may end a benchmark.
    warnings.simplefilter("default")
    context = Context(dry=args.dry_run, out=args.out, scratch=args.scratch, deadline=deadline)
    section = importlib.import_module(f"benchmarks.gpu.sections.{args.section}")
    planned: list[Case] = section.cases(context)
    begun = results.begun(results.read_lines(args.records))
    note(args.records, {"planned": [case.name for case in planned]})
    cases = [case for case in planned if case.name not in begun]
    for number, case in enumerate(cases):
        if number and context.left <= 0:
            return 0
        with given_up(case.name, max(LONGEST_CASE * args.seconds, 5.0), args.records):
            poisoned = run_case(case, context, args.records)
        if poisoned:
            return POISONED
        if args.isolated and number + 1 < len(cases):
            return NEXT
    return 0


@contextlib.contextmanager
def given_up(name: str, seconds: float, records: Path) -> Iterator[None]:
    """End this process with a note of the reason, if the block takes too long."""

    def give_up() -> None:
        reason = f"it took more than {seconds:.0f} s, and was given up"
        failed = {"case": name, "state": "failed", "reason": reason, "seconds": seconds}
        note(records, failed)
        os._exit(POISONED)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def run_case(case: Any, context: Any, records: Path) -> bool:
    """Run a case and note its result; return True if CUDA cannot be used any more."""
    from benchmarks.gpu.case import NotHere
    from megatron_sffn.utils.errors import ConfigError

    note(records, {"begun": case.name})
    print(f"-- {case.name}", flush=True)
    start, poisoned = time.monotonic(), False
    record: dict[str, Any] = {"case": case.name}
    try:
        values = case.run()
        context.synchronize()
        record |= {"state": "passed", "values": dict(values or {})}
    except (NotHere, ConfigError) as reason:
        # A backend that cannot serve a size or a dtype refuses it in a sentence.
        record |= {"state": "skipped", "reason": sentence(reason)}
    except Exception as error:  # an error of any package is the result of the case
        traceback.print_exc()
        record |= {"state": "failed", "reason": sentence(error)}
        poisoned = is_of_cuda(error)
    sys.stderr.flush()
    note(records, {**record, "seconds": round(time.monotonic() - start, 3)})
    return poisoned


def sentence(error: BaseException) -> str:
    """An error in one line, with the name of its class unless it is ours."""
    from benchmarks.gpu.case import Failure, NotHere
    from megatron_sffn.utils.errors import ConfigError

    words = " ".join(str(error).split())
    if not isinstance(error, Failure | NotHere | ConfigError):
        words = f"{type(error).__name__}: {words}"
    return words[:LONGEST_SENTENCE]


def is_of_cuda(error: BaseException) -> bool:
    """True if later CUDA calls of this process fail after the error; not for out of memory."""
    kind, words = type(error).__name__, str(error)
    if TRITON in words:
        return not any(harmless in words for harmless in HARMLESS)
    return kind != "OutOfMemoryError" and (kind == "AcceleratorError" or "CUDA error" in words)


def note(records: Path, line: dict[str, Any]) -> None:
    """Append a line, and make sure that it is on the disk."""
    with records.open("a", encoding="utf-8") as file:
        # A process that died may have left an incomplete line.
        file.write("\n" + json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


if __name__ == "__main__":
    sys.exit(main())
