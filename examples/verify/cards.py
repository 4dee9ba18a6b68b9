"""The verification card of a configuration: what was run for it, when, where, and what came out.

Inputs and outputs: `examples/configs/cards/NAME.json`.

Design notes: a card keeps a digest of the script's flags. A check counts as done only if it passed
for the flags of today, so that an edited script makes its card stale. The commit is the last one
that changed the package or a script, which stays the same when other files change.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

from examples.verify.configurations import FOLDER, ROOT, Configuration
from megatron_sffn.utils.atomic_files import atomic_write_text

CARDS = FOLDER / "cards"
CHECKS = ("built", "trained", "memory", "layouts", "gpu")
PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"
CODE = ("megatron_sffn", "tools", "examples/configs/*.sh")
"""Paths in git of what is verified."""


def card_path(configuration: Configuration) -> Path:
    """The file of a configuration's card."""
    return CARDS / f"{configuration.name.replace(' ', '-')}.json"


def read_card(configuration: Configuration) -> dict[str, Any]:
    """The card of a configuration; a new one, in which nothing was run, if there is none."""
    path = card_path(configuration)
    if path.exists():
        card: dict[str, Any] = json.loads(path.read_text())
        return card
    return {
        "configuration": configuration.name,
        "command": configuration.line,
        "flags_sha256": "",
        "counts": {},
        "checks": {name: {"result": NOT_RUN} for name in CHECKS},
    }


def write_card(configuration: Configuration, card: dict[str, Any]) -> None:
    """Replace the card of a configuration."""
    CARDS.mkdir(exist_ok=True)
    atomic_write_text(card_path(configuration), json.dumps(card, indent=1) + "\n")


def problems(
    configuration: Configuration, card: dict[str, Any], counts: dict[str, int]
) -> list[str]:
    """Why a card does not hold today: sentences, none if it does.

    Args:
        configuration: of the card.
        card: as it was read.
        counts: parameters and FLOPs of today's accounting.
    """
    sentences = []
    if card["flags_sha256"] != configuration.digest():
        sentences.append("the flags of the script have changed since")
    if card["counts"] != counts:
        sentences.append(f"it counts {card['counts']}, today's accounting {counts}")
    for name in CHECKS:
        check = card["checks"][name]
        if check["result"] == FAILED:
            sentences.append(f"{name} failed: {check['reason']}")
        elif check["result"] == PASSED and not _says_how(check.get("run", {})):
            sentences.append(f"{name} does not say how it was run")
        elif check["result"] not in (PASSED, FAILED, NOT_RUN):
            sentences.append(f"{name} is {check['result']!r}")
    return sentences


def _says_how(run: dict[str, Any]) -> bool:
    """True if the record of a check's run is complete."""
    return all(run.get(key) for key in ("command", "commit", "date", "machine", "seconds"))


def run_record(command: str, seconds: float) -> dict[str, Any]:
    """How a check was run: command, seconds, date, commit and machine."""
    return {
        "command": command,
        "seconds": round(seconds, 1),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
        "commit": commit(),
        "machine": machine(),
    }


def commit() -> str:
    """The last commit that changed what is verified, with `-dirty` if it has changed since."""

    def git(*words: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(ROOT), *words, "--", *CODE]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    name = git("log", "-1", "--format=%h", "--abbrev=10")
    return f"{name}-dirty" if git("status", "--porcelain") else name


def machine() -> dict[str, str]:
    """CPU, cores that this process may use, and versions."""
    info = Path("/proc/cpuinfo")
    models = re.findall(r"^model name\s*: (.*)$", info.read_text() if info.exists() else "", re.M)
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": str(len(os.sched_getaffinity(0))),
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "megatron-core": importlib.metadata.version("megatron-core"),
    }
