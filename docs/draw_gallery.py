"""Draws the figures of `docs/gallery.md`: `python -m docs.draw_gallery`.

Inputs: what the tools of this project print and draw. Outputs: figures and the small data that they
show in `docs/images/gallery/`, `docs/images/gallery.json` with command, seconds, date and checksums
of each, and the page, with the figures between its markers renewed.

Design notes: a command runs in `runs/gallery/NAME`, and a finished one is not run again. The
checksums are those of the data when the figure was drawn: a test finds a figure that is older than
its data.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from docs.gallery_figures import FIGURES, QUICKSTART, ROOT, Figure
from docs.marked_text import replace_marked
from megatron_sffn.utils.errors import CommandParser, ConfigError, run_command

IMAGES = ROOT / "docs" / "images"
FOLDER = IMAGES / "gallery"
MANIFEST = IMAGES / "gallery.json"
PAGE = ROOT / "docs" / "gallery.md"


def sha256(path: Path) -> str:
    """Checksum of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def run(figure: Figure, *, again: bool) -> float:
    """Run the command of a figure, unless it has finished; returns its seconds."""
    if figure.command == "make quickstart":
        begin, end = QUICKSTART / "settings.json", QUICKSTART / "report.html"
        if not end.exists():
            subprocess.run(figure.command, shell=True, check=True, cwd=ROOT)
        return end.stat().st_mtime - begin.stat().st_mtime
    if figure.command.startswith("python -m docs.draw_gallery"):
        figure.out.mkdir(parents=True, exist_ok=True)
        return 0.0  # `draw` does all of it
    done = figure.out / "seconds.json"
    if not done.exists() or again:
        shutil.rmtree(figure.out, ignore_errors=True)
        figure.out.mkdir(parents=True)
        command = figure.command.replace("OUT", str(figure.out.relative_to(ROOT)))
        start = time.monotonic()
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # a page says `python`
        subprocess.run(command, shell=True, check=True, cwd=ROOT, env={**os.environ, "PATH": path})
        done.write_text(json.dumps(time.monotonic() - start))
    return float(json.loads(done.read_text()))


def draw(figure: Figure, *, again: bool) -> dict[str, Any]:
    """Make a figure and its data; returns its entry of the manifest."""
    seconds, start = run(figure, again=again), time.monotonic()
    picture, data = figure.collect(figure.out)
    seconds += time.monotonic() - start
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / figure.name).write_bytes(picture)
    for name, content in data.items():
        (FOLDER / name).write_bytes(content)
    paths = [FOLDER / name for name in data] + [ROOT / path for path in figure.data]
    return {
        "figure": str((FOLDER / figure.name).relative_to(ROOT)),
        "sha256": sha256(FOLDER / figure.name),
        "command": figure.command,
        "seconds": round(seconds, 1),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "data": {str(path.relative_to(ROOT)): sha256(path) for path in paths},
    }


def read_manifest() -> dict[str, dict[str, Any]]:
    """Name of a figure -> its entry."""
    entries: dict[str, dict[str, Any]] = json.loads(MANIFEST.read_text())
    return entries


def stale(manifest: dict[str, dict[str, Any]]) -> list[str]:
    """Figures and data that have changed since a figure was drawn, as sentences."""
    return [
        f"{name}: {path} has changed since it was drawn"
        for name, entry in manifest.items()
        for path, checksum in {entry["figure"]: entry["sha256"], **entry["data"]}.items()
        if sha256(ROOT / path) != checksum
    ]


def section(figure: Figure, entry: dict[str, Any]) -> str:
    """The section of a figure: heading, picture, text, command, time and data."""
    data = ", ".join(f"[{Path(path).name}](../{path})" for path in entry["data"])
    return (
        f"## {figure.title}\n\n{wrapped(figure.text)}\n\n"
        f"![{figure.title}](images/gallery/{figure.name})\n\n"
        f"```\n{entry['command']}\n```\n\n"
        f"{entry['seconds']:,} s on 2 cores, {entry['date']}; data: {data}"
    )


def wrapped(text: str) -> str:
    """A text in lines, as in other pages."""
    return textwrap.fill(text, width=105, break_long_words=False, break_on_hyphens=False)


def renewed(page: str) -> str:
    """The page with the text between its markers replaced."""
    entries = read_manifest()
    sections = [section(f, entries[f.name]) for f in FIGURES if f.name in entries]
    return replace_marked(page, "figures", "\n\n".join(sections))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with the arguments of the command line."""
    parser = CommandParser(
        prog="python -m docs.draw_gallery",
        description="Draw the figures of docs/gallery.md with the tools, and time them.",
    )
    add: Callable[..., argparse.Action] = parser.add_argument
    add("--only", default="", metavar="REGEX", help="figures whose name matches")
    add("--again", action="store_true", help="also run commands that have finished")
    args = parser.parse_args(argv)
    chosen = [figure for figure in FIGURES if re.search(args.only, figure.name)]
    if not chosen:
        names = ", ".join(figure.name for figure in FIGURES)
        raise ConfigError(f"--only {args.only} matches no figure; choose from {names}")
    entries = read_manifest() if MANIFEST.exists() else {}
    for figure in chosen:
        print(f"drawing {figure.name}", file=sys.stderr, flush=True)
        entries[figure.name] = draw(figure, again=args.again)
        ordered = {f.name: entries[f.name] for f in FIGURES if f.name in entries}
        MANIFEST.write_text(json.dumps(ordered, indent=1) + "\n")
    PAGE.write_text(renewed(PAGE.read_text()))
    return 0


if __name__ == "__main__":
    run_command(main)
