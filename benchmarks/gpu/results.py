"""Write results.json of all commands on one machine, and describe it in lines of text.

Inputs: the notes of the processes of a section. Outputs: one file, rewritten by an atomic write
after each section; lines of text with a tick, a cross, or a dash for what could not run on this
machine.
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
"""Most lines that a command prints at its end."""


class Store:
    """results.json: command -> section -> its entry.

    Args:
        path: path of the file; the entries of other commands stay.
        command: the command whose sections are added.
        dry: True for a dry run.
    """

    def __init__(self, path: Path, command: str, *, dry: bool) -> None:
        self.path, self.command = path, command
        commands = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self.everything: dict[str, Any] = commands
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        entry = commands.setdefault(command, {"sections": {}})
        entry |= {"date": now, "dry_run": dry}
        self.sections: dict[str, Any] = entry["sections"]

    def add(self, section: str, entry: dict[str, Any]) -> None:
        """Add or replace a section, and write the file."""
        self.sections[section] = entry
        temporary = self.path.with_suffix(".part")
        temporary.write_text(json.dumps(self.everything, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, self.path)


def read_lines(records: Path) -> list[dict[str, Any]]:
    """The notes of the processes of a section, without a line that was cut short."""
    lines = []
    for line in records.read_text(encoding="utf-8").splitlines() if records.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines


def begun(lines: Sequence[Mapping[str, Any]]) -> set[str]:
    """The names of the cases that a process of the section has begun."""
    return {line["begun"] for line in lines if "begun" in line}


def entry(lines: Sequence[Mapping[str, Any]], reason: str, seconds: float) -> dict[str, Any]:
    """The entry of a section.

    Args:
        lines: the notes of its processes.
        reason: why its last process was ended or not started again; else empty.
        seconds: its duration.
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
    """The entry of a section for which no time was left."""
    return entry([], "no time was left for it", 0.0) | {"state": "cut"}


def line(name: str, section: Mapping[str, Any]) -> str:
    """One line about a section: a mark, its duration, and its failures."""
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
    example = next((case for case in section["cases"] if case["state"] == "failed"), None)
    if example is None and section["state"] == "skipped":
        example = next(iter(section["cases"]), None)
    if example is not None:
        words.append(f"{example['case']}: {example['reason']}")
    return f"{TICKS[section['state']]} {name:12} {section['seconds']:.0f} s: {'; '.join(words)}"


def closing(sections: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """The last lines of a command: all failures, and the notes of the sections.

    Args:
        sections: sections of the command.
        names: names of the sections that it ran.
    """
    lines: list[str] = []
    for name in names:
        cases = sections[name]["cases"]
        lines += [
            f"✗ {name}: {case['case']}: {case['reason']}"
            for case in cases
            if case["state"] == "failed"
        ][:4]
        lines += [note for case in cases for note in case.get("values", {}).get("print", ())]
    if len(lines) > MOST_LINES - 2:
        lines = [*lines[: MOST_LINES - 3], f"... and more: {len(lines)} lines in results.json"]
    bad = [name for name in names if sections[name]["state"] in ("failed", "cut")]
    return [*lines, f"not right: {', '.join(bad)}" if bad else "all sections passed or skipped"]
