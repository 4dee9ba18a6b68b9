"""Faults: each function causes one in a real run.

Inputs: a folder. Outputs: the cost of the fault, for the table of `python -m tests.faults`, or an
`AssertionError` if the run did not survive.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import resource
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from megatron_sffn.checkpoints.files import folder_to_load, iteration_of, problem_of
from tests.faults.jobs import EP2, Agent, Job, SmallDisk, job, progress_column, validation_loss
from tests.support.processes import HANGS, wait_until

INTERVAL = 5
"""Steps between saves."""

STEPS = 14
"""Steps of a run; its last save lies between two intervals."""

RUN = f"{EP2} --train-iters {STEPS} --save-interval {INTERVAL} --hidden-dropout 0.1"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The cost of a fault for a run that survived.

    Args:
        lost: the largest number of steps that had to be repeated.
        note: a remark for the table.
    """

    lost: int = 0
    note: str = ""


def resuming_flags(folder: Path) -> str:
    """Flags of a run that resumes where it stopped."""
    return f"{RUN} --save {folder} --load {folder}"


def undisturbed(folder: Path) -> Job:
    """A run without a fault, with its files in `folder/run`."""
    with job(2, resuming_flags(folder / "run"), folder) as run:
        assert run.wait() == [0, 0], run.log()
    return run


def assert_equal_results(save: Path, log: str, undisturbed_job: Job) -> None:
    """Check that a run with a fault ended exactly as the run without one.

    Args:
        save: the run's folder.
        log: the log of all its processes.
        undisturbed_job: the run to compare with.
    """
    norms, expected = (
        progress_column(log, "grad norm"),
        progress_column(undisturbed_job.log(), "grad norm"),
    )
    assert norms == expected
    assert validation_loss(log) == validation_loss(undisturbed_job.log())
    for name in ("routing.jsonl", "latest_checkpointed_iteration.txt"):
        assert (save / name).read_text() == (undisturbed_job.folder / "run" / name).read_text(), (
            name
        )
    assert _results(save) == _results(undisturbed_job.folder / "run")


def _results(save: Path) -> dict[str, object]:
    """The summary without what may differ from run to run: speed, command, checkpoint, commit."""
    summary = json.loads((save / "summary.json").read_text())
    varying = ("tokens_per_second", "peak_memory_bytes", "command", "started_from", "commit")
    return {name: value for name, value in summary.items() if name not in varying}


def killed_job(folder: Path, undisturbed_job: Job, *, kills: int, seed: int) -> Outcome:
    """All ranks get SIGKILL at random moments, about half of the times while the run saves.

    A run that reaches its end is compared with the undisturbed one, and another run begins.
    """
    moments, lost, saves = random.Random(seed), 0, 0
    for number in itertools.count():
        save, log = folder / f"run{number}", ""
        while not (save / "summary.json").exists():
            with job(2, resuming_flags(save), folder / f"logs{number}") as run:
                if kills and _reaches_random_moment(run, moments):
                    run.send(signal.SIGKILL)
                run.wait()
            log += run.log()
            if set(run.codes.values()) == {-signal.SIGKILL}:
                kills -= 1
                saves += run.log(0).count("saving checkpoint") > run.log(0).count("successfully")
                lost = max(lost, _lost_steps(save, log))
            else:
                assert (save / "summary.json").exists(), run.log()
        assert_equal_results(save, log, undisturbed_job)
        if not kills:
            return Outcome(lost=lost, note=f"{saves} of them in a save")
    raise AssertionError(kills)


def _reaches_random_moment(run: Job, moments: random.Random) -> bool:
    """Wait for a random moment; returns whether the run still runs."""
    if moments.random() < 0.5:
        saves = moments.randint(1, 3)
        wait_until(
            lambda: not run.runs() or run.log(0).count("saving checkpoint") >= saves, HANGS, run.log
        )
        time.sleep(10 ** moments.uniform(-3, 0))
    else:
        time.sleep(moments.uniform(0, 3))
    return run.runs()


def _lost_steps(save: Path, log: str) -> int:
    """The steps to repeat after a kill; checks that the last checkpoint can be loaded."""
    checkpoint = folder_to_load(save, None)
    assert checkpoint is None or problem_of(checkpoint) is None, checkpoint
    saved_step = 0 if checkpoint is None else iteration_of(checkpoint)
    lost = max([saved_step, *progress_column(log, "grad norm")]) - saved_step
    assert lost <= INTERVAL, (lost, saved_step)
    return lost


def killed_rank(folder: Path, undisturbed_job: Job) -> Outcome:
    """One rank gets SIGKILL in the middle of a step; torchrun restarts all ranks."""
    save = folder / "run"
    with Agent(resuming_flags(save), folder, "--max-restarts", "1") as agent:
        agent.wait_for(r"iteration +1/")
        victim = agent.ranks()[0]
        agent.wait_for(r"iteration +7/")
        victim.kill()
        assert agent.wait() == 0, agent.log()
    steps = [int(step) for step in re.findall(r"iteration +(\d+)/", agent.log())]
    repeated_steps = len(steps) - STEPS
    assert 0 < repeated_steps <= INTERVAL, steps
    assert_equal_results(save, agent.log(), undisturbed_job)
    return Outcome(lost=repeated_steps)


def asked_to_stop(
    folder: Path,
    undisturbed_job: Job,
    number: signal.Signals,
    rank: int | None = None,
    flags: str = "",
) -> Outcome:
    """A signal to all ranks, or to one: the run saves and ends with exit code 0."""
    save = folder / "run"
    with job(2, f"{resuming_flags(save)} {flags}", folder) as run:
        run.wait_for(r"iteration +7/")
        run.send(number, rank)
        assert run.wait() == [0, 0], run.log()
    lost = _lost_steps(save, run.log())
    with job(2, resuming_flags(save), folder / "rest") as resumed:
        assert resumed.wait() == [0, 0], resumed.log()
    assert_equal_results(save, run.log() + resumed.log(), undisturbed_job)
    return Outcome(lost=lost)


def torchrun_asked_to_stop(folder: Path) -> Outcome:
    """SIGTERM to torchrun, which passes it to the ranks: they save before they end."""
    save = folder / "run"
    with Agent(resuming_flags(save), folder) as agent:
        agent.wait_for(r"iteration +7/")
        agent.process.send_signal(signal.SIGTERM)
        code = agent.wait()
    assert "exiting program after receiving SIGTERM" in agent.log(), agent.log()
    return Outcome(lost=_lost_steps(save, agent.log()), note=f"torchrun's exit code is {code}")


def full_disk(folder: Path, undisturbed_job: Job) -> Outcome:
    """The disk has room for one checkpoint and not for the next."""
    save = folder / "disk" / "run"
    folder.mkdir(exist_ok=True)
    size = size_of(undisturbed_job.folder / "run" / f"iter_{INTERVAL:07d}")
    with SmallDisk(folder / "disk", round(1.5 * size)) as disk:
        with job(2, resuming_flags(save), folder / "full") as run:
            assert run.wait(rank=0) == [2], run.log(0)
        sentence = run.log(0).splitlines()[-1]
        assert re.search(
            rf"^error: checkpoint {save}/iter_0000010 needs \S+ kB, but --save {save} has \S+ kB "
            rf"free; iteration {INTERVAL} is the last one there: make room, and give",
            sentence,
        ), sentence
        assert sorted(path.name for path in save.iterdir()) == FILES_AFTER_FULL_DISK
        lost = _lost_steps(save, run.log())
        disk.grow(10 * size)
        with job(2, resuming_flags(save), folder / "rest") as resumed:
            assert resumed.wait() == [0, 0], resumed.log()
        assert_equal_results(save, run.log() + resumed.log(), undisturbed_job)
    return Outcome(lost=lost)


FILES_AFTER_FULL_DISK = [
    "arguments.txt",
    f"iter_{INTERVAL:07d}",
    "latest_checkpointed_iteration.txt",
    "routing.jsonl",
]
"""Names in the folder of a run that could not save a second time."""


def failing_write(folder: Path, undisturbed_job: Job) -> Outcome:
    """A write fails in the middle of a save."""
    save = folder / "run"
    first_checkpoint = undisturbed_job.folder / "run" / f"iter_{INTERVAL:07d}"
    limit = max(path.stat().st_size for path in first_checkpoint.iterdir()) // 2
    with job(2, resuming_flags(save), folder / "failing") as run:
        run.wait_for(r"successfully saved", rank=0)
        for pid in run.pids:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit, limit))
        assert run.wait(rank=0) == [2], run.log(0)
    assert f"error: checkpoint {save}/iter_0000010 needs" in run.log(0), run.log(0)
    assert "and writing failed; iteration 5 is the last one there" in run.log(0), run.log(0)
    assert sorted(path.name for path in save.iterdir()) == FILES_AFTER_FULL_DISK
    lost = _lost_steps(save, run.log())
    with job(2, resuming_flags(save), folder / "rest") as resumed:
        assert resumed.wait() == [0, 0], resumed.log()
    assert_equal_results(save, run.log() + resumed.log(), undisturbed_job)
    return Outcome(lost=lost)


def hung_rank(folder: Path, rank: int) -> Outcome:
    """A rank stops in the middle of a step: the other rank reports it and ends."""
    flags = f"{RUN} --distributed-timeout-seconds-after-init 4"
    with job(2, flags, folder) as run:
        run.wait_for(r"iteration +3/")
        run.send(signal.SIGSTOP, rank)
        start, other_rank = time.monotonic(), 1 - rank
        assert run.wait(rank=other_rank) != [0], run.log(other_rank)
        seconds = time.monotonic() - start
        line = re.search(r"^no progress for .*", run.log(other_rank), re.MULTILINE)
        assert line, run.log(other_rank)
    return Outcome(note=f"{seconds:.0f} s; {line[0]}")


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(path.stat().st_size for path in folder.iterdir())
