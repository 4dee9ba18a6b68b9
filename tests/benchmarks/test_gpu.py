"""`benchmarks.gpu`: the commands run without a GPU, and the supervisor survives failing cases."""

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

from benchmarks.gpu import results, rows, supervisor, worker
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.case import Context, Failure, NotHere
from benchmarks.gpu.clock import Measured
from benchmarks.gpu.plan import PLANS, Section, share
from benchmarks.gpu.sections import layers, train
from benchmarks.gpu.supervisor import Command, environment
from megatron_sffn.utils.errors import ConfigError
from tests.support.paths import ROOT
from tests.support.simulated_gpu import simulate_gpu

ALL_FILES = {
    "results.json",
    "log.txt",
    "syncs.csv",
    "sanitizer.txt",
    "products.csv",
    "layers.csv",
    "tiles.json",
    "ncu.csv",
}
"""Names of all files that the three commands may write."""


SKIPPED_CASES = {
    "ops: grouped: g=1 E=4 T=7 D=16 bfloat16",
    "sanitizer: memcheck triton_grouped",
    "ncu: triton_grouped g=16",
}
"""Cases that need a GPU or its tools; those of backend quack also need them."""


@pytest.mark.skipif(
    torch.__version__ >= TorchVersion("2.12"),
    reason="make gpu-rehearsal runs it, under the versions of a GPU machine",
)
def test_dry_runs_of_all_commands_pass_every_section(tmp_path: Path) -> None:
    flags = ["--dry-run", "--seconds", "3600"]  # enough for every section, also on a busy machine
    processes = {
        command: subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu", command, "--out", tmp_path / command, *flags],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for command in PLANS
    }
    file_names: set[str] = set()
    skipped: set[str] = set()
    try:
        for command, process in processes.items():
            output, _ = process.communicate(timeout=1200)
            log = (tmp_path / command / "log.txt").read_text()
            assert process.returncode == 0, f"{output}\n{log[-6000:]}"
            file_names |= {path.name for path in (tmp_path / command).iterdir()}
            section_lines = [line for line in output.splitlines() if line.startswith(("✓", "–"))]
            assert [line.split()[1] for line in section_lines] == [
                section.name for section in PLANS[command]
            ]
            last_lines = output.split("\n\n", 1)[1].splitlines()
            assert len(last_lines) <= results.MOST_LINES
            entry = json.loads((tmp_path / command / "results.json").read_text())[command]
            assert entry["dry_run"] is True
            for name, section in entry["sections"].items():
                needs_tools = name in ("sanitizer", "ncu")  # a machine without a GPU lacks them
                assert section["state"] == ("skipped" if needs_tools else "passed"), name
                skipped |= {
                    f"{name}: {case['case']}"
                    for case in section["cases"]
                    if case["state"] == "skipped" and not case["case"].startswith("quack")
                }
    finally:
        for process in processes.values():
            process.kill()
            process.communicate()
    assert skipped == SKIPPED_CASES
    assert file_names == ALL_FILES - {"sanitizer.txt", "ncu.csv"}  # only the tools write them


SECTION_SOURCE = """
import os, signal, time
from benchmarks.gpu.case import Case, Failure, NotHere

def wrong():
    raise Failure("2 is not 3")

def absent():
    raise NotHere("no such card")

def poisoned():
    raise RuntimeError("CUDA error: device-side assert triggered")

def launch():
    raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

def refused():
    raise RuntimeError("Triton Error [CUDA]: invalid argument")

def killed():
    os.kill(os.getpid(), signal.SIGKILL)

def right():
    return {"pid": os.getpid()}

def slow():
    time.sleep(1000)

def cases(context):
    names = os.environ["CASES"].split()
    return [Case(name=name, run=globals()[name.split("-")[0]]) for name in names]
"""


def run_section(names: str, seconds: float, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the cases above as a section, from a folder that is added to the path of sections."""
    for name in ("more", "out", "scratch"):
        (folder / name).mkdir()
    (folder / "more" / "broken.py").write_text(SECTION_SOURCE)
    hook = f"import benchmarks.gpu.sections as s; s.__path__.append({str(folder / 'more')!r})"
    hook = f"import sys; sys.path.insert(0, {str(ROOT)!r}); {hook}"
    (folder / "sitecustomize.py").write_text(hook)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setenv("CASES", names)
    command = Command(name="check", out=folder / "out", seconds=seconds, dry=True)
    section = Section(name="broken", seconds=seconds)
    log = folder / "out" / "log.txt"
    return supervisor._run_section(section, command, seconds, folder / "scratch", log)


def test_the_cases_after_one_that_kills_its_process_still_run(
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


def test_a_cuda_error_restarts_the_process_and_a_refused_launch_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = "right-1 refused right-2 launch right-3"
    entry = run_section(names, 300, tmp_path, monkeypatch)
    assert [case["case"] for case in entry["cases"]] == names.split()
    first, second, third = (
        case["values"]["pid"] for case in entry["cases"] if case["case"].startswith("right")
    )
    assert first == second != third


def test_cases_that_did_not_run_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "MOST_STARTS", 1)
    entry = run_section("killed right", 300, tmp_path, monkeypatch)
    assert [case["case"] for case in entry["cases"]] == ["killed"]
    assert entry["not_run"] == ["right"]


def test_the_lines_after_a_truncated_line_are_read(tmp_path: Path) -> None:
    records = tmp_path / "records.jsonl"
    worker.note(records, {"begun": "a"})
    with records.open("a") as file:
        file.write('{"case": "a", "sta')
    worker.note(records, {"begun": "b"})
    assert results.read_lines(records) == [{"begun": "a"}, {"begun": "b"}]


def test_a_case_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = time.monotonic()
    entry = run_section("slow", 8, tmp_path, monkeypatch)
    assert entry["state"] == "failed"
    # The process of the case ends it, or the supervisor does on a busy machine.
    reason = " ".join([entry["reason"], *(case["reason"] for case in entry["cases"])])
    assert "was given up" in reason or "its time" in reason
    assert time.monotonic() - start < 500, "the case sleeps for 1,000 s"


def test_sections_share_the_remaining_time() -> None:
    plan = tuple(
        Section(name=str(number), seconds=seconds) for number, seconds in enumerate((10, 30, 60))
    )
    assert share(plan, 100) == 10
    assert share(plan[1:], 45) == 15
    assert share(plan[2:], 45) == 45


def test_results_of_a_command_are_kept_when_another_one_runs(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    passed = {"case": "a", "state": "passed", "seconds": 1, "values": {}}
    results.Store(path, "check", dry=False).add("env", results.entry([passed], "", 1.0))
    results.Store(path, "time", dry=False).add("layers", results.not_started())
    commands = json.loads(path.read_text())
    assert commands["check"]["sections"]["env"]["state"] == "passed"
    assert commands["time"]["sections"]["layers"]["state"] == "cut"


def test_a_section_passes_only_if_all_its_planned_cases_ran() -> None:
    skipped = {"case": "a", "state": "skipped", "seconds": 0, "reason": "absent"}
    passed = {"case": "b", "state": "passed", "seconds": 0}
    assert results.entry([skipped], "", 1.0)["state"] == "skipped"
    assert results.entry([skipped, passed], "", 1.0)["state"] == "passed"
    planned = {"planned": ["b", "c"]}
    assert results.entry([planned, {"begun": "b"}, passed], "", 1.0)["state"] == "cut"
    assert results.entry([], "exit code 1", 1.0)["state"] == "failed"


def test_only_a_dry_run_hides_the_gpu_and_uses_the_interpreter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "TRITON_INTERPRET" not in environment(dry=False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    dry = environment(dry=True)
    assert (dry["TRITON_INTERPRET"], dry["CUDA_VISIBLE_DEVICES"]) == ("1", "")


def context_of(folder: Path) -> Context:
    return Context(dry=True, out=folder, scratch=folder, deadline=float("inf"))


def test_missing_losses_fail_the_resume_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def repeat(printed: dict[tuple[str, int], range], validation: float | None = 1.0) -> None:
        def fake_train(run: train.Run, _: Context) -> train.Losses:
            # Both parts write to one folder; the second part resumes and runs to the end.
            steps = printed[run.folder.name, run.stop]
            return train.Losses(steps={step: f"{step}" for step in steps}, validation=validation)

        monkeypatch.setattr(train, "train", fake_train)
        train.repeat(context_of(tmp_path))

    complete_steps = {
        ("whole", 4): range(1, 5),
        ("parts", 2): range(1, 3),
        ("parts", 4): range(3, 5),
    }
    repeat(complete_steps)
    for run in complete_steps:
        with pytest.raises(Failure, match="printed losses of steps"):
            repeat({**complete_steps, run: range(0)})
    with pytest.raises(Failure, match=r"the resumed part printed losses of steps \[1, 2, 3, 4\]"):
        repeat({**complete_steps, ("parts", 4): range(1, 5)})
    with pytest.raises(Failure, match="no validation loss"):
        repeat(complete_steps, None)


def test_comparing_a_single_backend_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake_train(run: train.Run, _: Context) -> train.Losses:
        if run.backend.startswith("triton"):
            raise NotHere("no such backend")
        return train.Losses(steps={1: "2.5", 2: "2.4"}, validation=2.4)

    monkeypatch.setattr(train, "train", fake_train)
    with pytest.raises(Failure, match="alone trains"):
        train.compare("switch", context_of(tmp_path))


def test_the_table_includes_rows_of_earlier_processes(tmp_path: Path) -> None:
    context = context_of(tmp_path)
    size = layers.size_of(16, 8, 2, torch.float32, context)
    for contender, ms in (("torch", 3.0), ("triton", 5.0)):
        measured = Measured(ms=(ms,), peak=0)
        row = rows.row_of(size, measured, contender=contender, what=layers.WHAT, unit=2.0)
        rows.write([row], layers.FILE, context)
    assert layers.table(16, context)["print"][1:] == [
        "   g  E     torch    triton",
        "   8  2      1.50      2.50",
    ]
    assert len(layers.table(1024, context)["print"]) == 2


def test_the_small_programs_start_every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import JITFunction

    from benchmarks import triton_starts
    from benchmarks.gpu import small

    simulate_gpu(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    started: list[triton_starts.Start] = []
    with triton_starts.handed_to(started.append):
        for name in small.targets():
            small.main([name, *small.CHUNKED])
    kernels = {
        name
        for module in list(sys.modules.values())
        if module.__name__.startswith("megatron_sffn.ops.")
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and name.endswith("_kernel")
    }
    assert {start.kernel.fn.__name__ for start in started} == kernels
    sum_starts = [start for start in started if start.kernel.fn.__name__ == "sum_chunks_kernel"]
    # All tokens of the small case have block 0.
    assert sum_starts and all(2 * start.arguments["length"] <= 197 for start in sum_starts)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("check --out {out} --seconds 3", "--seconds 3 is too short"),
        ("tune --out {out} --only env", "--only env is no section of tune; choose from tune, ncu"),
        ("time --out {file}", "cannot be made"),
        ("probe --out {out}", "probe"),
    ],
)
def test_bad_input_is_refused(flags: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    command = flags.format(out=tmp_path / "out", file=tmp_path / "file").split()
    with pytest.raises(ConfigError) as error_info:
        main(command)
    assert message in str(error_info.value)
