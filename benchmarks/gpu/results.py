"""results.json of all commands on one machine, and the lines that say what is in it.

Inputs: what the processes of a section have noted. Outputs: one file, replaced as a whole after
each section; lines of text with a tick, a cross, or a dash for what could not run on the machine.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TICKS = {"passed": "✓", "failed": "✗", "cut": "✗", "skipped": "–"}
"""State of a section -> its mark."""

MOST_LINES = 60
"""That a command prints at its end."""


class Store:
    """results.json: command -> section -> its entry.

    Args:
        path: of the file; what other commands have written in it stays.
        command: whose sections are added.
        dry: whether they are of a dry run.
    """

    def __init__(self, path: Path, command: str, *, dry: bool) -> None:
        self.path, self.command = path, command
        former = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self.everything: dict[str, Any] = former
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        entry = former.setdefault(command, {"sections": {}})
        entry |= {"date": now, "dry_run": dry}
        self.sections: dict[str, Any] = entry["sections"]

    def add(self, section: str, entry: dict[str, Any]) -> None:
        """Add a section, or replace it, and write the file."""
        self.sections[section] = entry
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.everything, indent=1) + "\n", encoding="utf-8")
        os.replace(part, self.path)


def read_lines(records: Path) -> list[dict[str, Any]]:
    """What the processes of a section have noted; a line that was cut short is left out."""
    lines = []
    for line in records.read_text(encoding="utf-8").splitlines() if records.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines


def begun(lines: Sequence[Mapping[str, Any]]) -> set[str]:
    """Names of the cases that a process of the section has begun."""
    return {line["begun"] for line in lines if "begun" in line}


def entry(lines: Sequence[Mapping[str, Any]], reason: str, seconds: float) -> dict[str, Any]:
    """A section's entry.

    Args:
        lines: what its processes have noted.
        reason: why its last process did not end by itself, or was not started again; else empty.
        seconds: that it took.
    """
    cases = [dict(line) for line in lines if "case" in line]
    planned = dict.fromkeys(name for line in lines for name in line.get("planned", ()))
    not_run = [name for name in planned if name not in begun(lines)]
    states = [case["state"] for case in cases]
    if "failed" in states or (reason and not cases):
        state = "failed"
    elif reason or not_run:
        state = "cut"
    else:
        state = "passed" if "passed" in states else "skipped"
    return {
        "state": state,
        "seconds": round(seconds, 1),
        "reason": reason,
        "not_run": not_run,
        "cases": cases,
    }


def not_started() -> dict[str, Any]:
    """The entry of a section that got no time."""
    return entry([], "no time was left for it", 0.0) | {"state": "cut"}


def line(name: str, section: Mapping[str, Any]) -> str:
    """How a section ended, in one line: a mark, its time, and what failed."""
    states = [case["state"] for case in section["cases"]]
    counts = ", ".join(
        f"{states.count(state)} {state}"
        for state in ("passed", "failed", "skipped")
        if state in states
    )
    words = [counts or "no case ran"]
    if section["not_run"]:
        words.append(f"{len(section['not_run'])} not run")
    if section["reason"] and "failed" not in states:
        words.append(section["reason"])
    first = next((case for case in section["cases"] if case["state"] == "failed"), None)
    if first is None and section["state"] == "skipped":
        first = next(iter(section["cases"]), None)
    if first is not None:
        words.append(f"{first['case']}: {first['reason']}")
    return f"{TICKS[section['state']]} {name:12} {section['seconds']:.0f} s: {'; '.join(words)}"


def closing(sections: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """The last lines of a command: what failed, and what the sections want to say.

    Args:
        sections: of the command.
        names: of those that it ran.
    """
    lines: list[str] = []
    for name in names:
        cases = sections[name]["cases"]
        lines += [
            f"✗ {name}: {case['case']}: {case['reason']}"
            for case in cases
            if case["state"] == "failed"
        ][:4]
        lines += [said for case in cases for said in case.get("values", {}).get("print", ())]
    if len(lines) > MOST_LINES - 2:
        lines = [*lines[: MOST_LINES - 3], f"... and more: {len(lines)} lines in results.json"]
    bad = [name for name in names if sections[name]["state"] in ("failed", "cut")]
    return [*lines, f"not right: {', '.join(bad)}" if bad else "all sections passed or skipped"]
