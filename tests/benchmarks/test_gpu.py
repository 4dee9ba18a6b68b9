"""`benchmarks.gpu`: the three commands run without a GPU, and the supervisor outlives a case."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.torch_version import TorchVersion

from benchmarks.gpu import results, supervisor
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.plan import PLANS, Section, share
from benchmarks.gpu.supervisor import Command, environment
from megatron_sffn.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
FILES = {
    "results.json",
    "log.txt",
    "syncs.csv",
    "sanitizer.txt",
    "products.csv",
    "layers.csv",
    "tiles.json",
    "ncu.csv",
}
"""All that the three commands may leave."""


@pytest.mark.skipif(
    torch.__version__ >= TorchVersion("2.12"),
    reason="make gpu-rehearsal runs it, under the versions of a GPU machine",
)
def test_dry_runs_pass_every_section(tmp_path: Path) -> None:
    flags = ["--dry-run", "--seconds", "3600"]  # a section has its share, on a busy machine, too
    started = {
        command: subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu", command, "--out", tmp_path / command, *flags],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for command in PLANS
    }
    left: set[str] = set()
    try:
        for command, process in started.items():
            output, _ = process.communicate(timeout=1200)
            log = (tmp_path / command / "log.txt").read_text()
            assert process.returncode == 0, f"{output}\n{log[-6000:]}"
            left |= {path.name for path in (tmp_path / command).iterdir()}
            ended = [line for line in output.splitlines() if line.startswith(("✓", "–"))]
            assert [line.split()[1] for line in ended] == [
                section.name for section in PLANS[command]
            ]
            closing = output.split("\n\n", 1)[1].splitlines()
            assert len(closing) <= results.MOST_LINES
            entry = json.loads((tmp_path / command / "results.json").read_text())[command]
            assert entry["dry_run"] is True
            for name, section in entry["sections"].items():
                tools = name in ("sanitizer", "ncu")  # which a machine without a GPU lacks
                states = {case["state"] for case in section["cases"]}
                assert section["state"] == "passed" or (tools and states == {"skipped"}), name
    finally:
        for process in started.values():
            process.kill()
            process.communicate()
    assert left <= FILES and left >= FILES - {"ncu.csv"}


SECTION = """
import os, signal, time
from benchmarks.gpu.case import Case, Failure, NotHere

def wrong():
    raise Failure("2 is not 3")

def absent():
    raise NotHere("no such card")

def poisoned():
    raise RuntimeError("CUDA error: device-side assert triggered")

def killed():
    os.kill(os.getpid(), signal.SIGKILL)

def right():
    return {"pid": os.getpid()}

def slow():
    time.sleep(1000)

def cases(context):
    return [Case(name=name, run=globals()[name]) for name in os.environ["CASES"].split()]
"""


def run_section(names: str, seconds: float, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the cases above as a section of its own, which lies in a folder that is searched, too."""
    for name in ("more", "out", "scratch"):
        (folder / name).mkdir()
    (folder / "more" / "broken.py").write_text(SECTION)
    hook = f"import benchmarks.gpu.sections as s; s.__path__.append({str(folder / 'more')!r})"
    hook = f"import sys; sys.path.insert(0, {str(ROOT)!r}); {hook}"
    (folder / "sitecustomize.py").write_text(hook)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setenv("CASES", names)
    command = Command(name="check", out=folder / "out", seconds=seconds, dry=True)
    section = Section(name="broken", seconds=seconds)
    log = folder / "out" / "log.txt"
    return supervisor._run_section(section, command, seconds, folder / "scratch", log)


def test_a_case_that_ends_its_process_costs_itself_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = "wrong absent poisoned killed right"
    entry = run_section(names, 300, tmp_path, monkeypatch)
    states = {case["case"]: case["state"] for case in entry["cases"]}
    assert states == {
        "wrong": "failed",
        "absent": "skipped",
        "poisoned": "failed",
        "killed": "failed",
        "right": "passed",
    }
    reasons = {case["case"]: case.get("reason", "") for case in entry["cases"]}
    assert reasons["wrong"] == "2 is not 3"
    assert signal.SIGKILL.name in reasons["killed"]
    line = results.line("broken", entry)
    assert line.startswith("✗ broken") and "1 passed, 3 failed, 1 skipped" in line
    assert "wrong: 2 is not 3" in line


def test_a_case_that_does_not_end_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = time.monotonic()
    entry = run_section("slow", 8, tmp_path, monkeypatch)
    assert entry["state"] == "failed"
    # Given up by its own process, or, on a machine that is busy, ended from outside.
    reason = " ".join([entry["reason"], *(case["reason"] for case in entry["cases"])])
    assert "was given up" in reason or "its time" in reason
    assert time.monotonic() - start < 500, "the case sleeps for 1,000 s"


def test_sections_share_the_time_that_is_left() -> None:
    plan = tuple(Section(name=str(n), seconds=seconds) for n, seconds in enumerate((10, 30, 60)))
    assert share(plan, 100) == 10
    assert share(plan[1:], 45) == 15
    assert share(plan[2:], 45) == 45


def test_results_of_one_command_stay_when_another_runs(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    passed = {"case": "a", "state": "passed", "seconds": 1, "values": {}}
    results.Store(path, "check", dry=False).add("env", results.entry([passed], "", 1.0))
    results.Store(path, "time", dry=False).add("layers", results.not_started())
    everything = json.loads(path.read_text())
    assert everything["check"]["sections"]["env"]["state"] == "passed"
    assert everything["time"]["sections"]["layers"]["state"] == "cut"


def test_a_section_that_could_run_nothing_has_not_passed() -> None:
    skipped = {"case": "a", "state": "skipped", "seconds": 0, "reason": "absent"}
    passed = {"case": "b", "state": "passed", "seconds": 0}
    assert results.entry([skipped], "", 1.0)["state"] == "skipped"
    assert results.entry([skipped, passed], "", 1.0)["state"] == "passed"
    assert results.entry([passed, {"not_run": ["c"]}], "", 1.0)["state"] == "cut"
    assert results.entry([], "exit code 1", 1.0)["state"] == "failed"


def test_a_dry_run_sees_no_gpu_and_a_real_one_has_no_interpreter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert environment(dry=True)["TRITON_INTERPRET"] == "1"
    assert "TRITON_INTERPRET" not in environment(dry=False)


@pytest.mark.parametrize(
    "flags, words",
    [
        ("check --out {out} --seconds 3", "--seconds 3 is too short"),
        ("tune --out {out} --only env", "--only env is no section of tune; choose from tune, ncu"),
        ("time --out {file}", "cannot be made"),
        ("probe --out {out}", "probe"),
    ],
)
def test_bad_input(flags: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    words_ = flags.format(out=tmp_path / "out", file=tmp_path / "file").split()
    with pytest.raises(ConfigError) as caught:
        main(words_)
    assert words in str(caught.value)
