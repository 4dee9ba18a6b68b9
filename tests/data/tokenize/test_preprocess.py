"""Resume: after a kill, an error or a full disk the same command writes the same files."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import preprocess_data
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_sffn.data.output.run_state import RunState, State
from megatron_sffn.data.text import chunks as text_chunks
from megatron_sffn.data.tokenize import preprocess, workers
from megatron_sffn.data.tokenize.dataset_writer import DatasetWriter
from megatron_sffn.data.tokenize.encoder import Column
from megatron_sffn.utils.errors import ConfigError
from tests.support import tokenizers
from tests.support.processes import HANGS
from tests.support.slow import slow

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    # Every chunk is saved before the next one is read.
    monkeypatch.setattr(preprocess, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(text_chunks, "CHUNK_BYTES", 2000)
    monkeypatch.setattr(workers, "TASK_BYTES", 2000)
    monkeypatch.setattr(workers, "AHEAD_BYTES", 4 * 2000)


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """Flags of a run over two files, with bad documents in both."""
    rng = random.Random(0)
    for name in ("a.jsonl", "b.jsonl"):
        with (tmp_path / name).open("w") as file:
            for number in range(150):
                text = " ".join(rng.choices(tokenizers.TEXTS, k=rng.randrange(30)))
                file.write("{bad\n" if number % 50 == 7 else json.dumps({"text": text}) + "\n")
    tokenizer = tokenizers.byte_level(tmp_path)
    return [
        *("--input", str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"), *tokenizer),
        *("--output-prefix", str(tmp_path / "out"), "--append-eod", "--workers", "1"),
        *("--on-error", "skip"),
    ]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("out*") if path.is_file()}


@pytest.fixture
def expected_files(tmp_path: Path, command: list[str]) -> dict[str, bytes]:
    """The files of an uninterrupted run."""
    assert preprocess_data.main(command) == 0
    files = files_of(tmp_path)
    for name in files:
        (tmp_path / name).unlink()
    assert sorted(files) == ["out_errors.jsonl", "out_text_document.bin", "out_text_document.idx"]
    return files


def start_process(run: Callable[[], Any]) -> Any:
    """Start a process that calls `run`; its exit code is 2 after a `ConfigError`."""

    def guarded() -> None:
        try:
            code = run()
        except ConfigError as error:
            print("error:", error, file=sys.stderr, flush=True)
            code = 2
        os._exit(code or 0)

    process = FORK.Process(target=guarded)
    process.start()
    return process


def stop_after(monkeypatch: pytest.MonkeyPatch, saves: int) -> None:
    """Kill the run after it was saved `saves` times."""
    save, remaining_saves = RunState.save, iter(range(saves))

    def save_or_die(run_state: RunState, state: State) -> None:
        save(run_state, state)
        if next(remaining_saves, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(RunState, "save", save_or_die)


@pytest.mark.parametrize("processes", ["1", "2"])
def test_runs_killed_at_random_moments_resume(
    tmp_path: Path, command: list[str], expected_files: dict[str, bytes], processes: str
) -> None:
    rng = random.Random(int(processes))
    command = [*command, "--workers", processes]
    partial, index = tmp_path / "out.partial", tmp_path / "out_text_document.idx"
    for _ in range(10):
        process = start_process(lambda: preprocess_data.main(command))
        process.join(rng.uniform(0.02, 0.4))
        process.kill()
        process.join(60)
        if index.exists():
            assert files_of(tmp_path).items() <= expected_files.items()
            if not partial.exists():
                break
    else:
        assert preprocess_data.main(command) == 0
    assert files_of(tmp_path) == expected_files
    assert not partial.exists()


@pytest.mark.parametrize("saves", [0, slow(1), slow(7), 40])
def test_the_same_command_resumes(
    tmp_path: Path,
    command: list[str],
    expected_files: dict[str, bytes],
    saves: int,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, saves)
        process = start_process(lambda: preprocess_data.main(command))
        process.join(60)
    assert process.exitcode == -signal.SIGKILL
    saved_state = json.loads((tmp_path / "out.partial" / "journal.json").read_text())
    assert saved_state["documents"] > saves
    # Bytes that were written after the saved state are cut off.
    for path in (tmp_path / "out.partial").glob("out_*"):
        with path.open("ab") as file:
            file.write(b"more")
    capfd.readouterr()
    other_flags = ["--workers", "2", "--log-interval", "7", "--engine", "tokenizers"]
    assert preprocess_data.main([*command, *other_flags]) == 0
    output = capfd.readouterr()
    assert (
        f"resuming in {tmp_path / 'out.partial'}, after {saved_state['documents']} docu"
        in output.err
    )
    assert "out_text_document: 294 documents" in output.out
    assert "6 documents left out (6 is not JSON)" in output.out
    assert files_of(tmp_path) == expected_files


def test_renames_that_a_kill_interrupted_are_completed(
    tmp_path: Path,
    command: list[str],
    expected_files: dict[str, bytes],
    capfd: pytest.CaptureFixture[str],
) -> None:
    replace, remaining_renames = Path.replace, iter(range(2))

    def replace_or_die(path: Path, target: Path) -> Path:
        if Path(target).parent == tmp_path and next(remaining_renames, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(path, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", replace_or_die)
        process = start_process(lambda: preprocess_data.main(command))
        process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert sorted(files_of(tmp_path)) == ["out_text_document.bin", "out_text_document.idx"]
    assert preprocess_data.main(command) == 0
    assert "out_text_document: 294 documents" in capfd.readouterr().out
    assert files_of(tmp_path) == expected_files
    assert not (tmp_path / "out.partial").exists()


def test_a_kill_while_the_folder_is_removed_loses_nothing(
    tmp_path: Path, command: list[str], expected_files: dict[str, bytes]
) -> None:
    def die_half_done(path: Path, **_: object) -> None:
        (path / "command.json").unlink()
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "rmtree", die_half_done)
        process = start_process(lambda: preprocess_data.main(command))
        process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert files_of(tmp_path) == expected_files
    with pytest.raises(ConfigError, match=r"is there already; add --overwrite"):
        preprocess_data.main(command)
    assert files_of(tmp_path) == expected_files
    assert not (tmp_path / "out.partial").exists()


def run_half(command: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 20)
        start_process(lambda: preprocess_data.main(command)).join(60)


@pytest.mark.parametrize("change", ["flags", "input", "tokenizer"])
def test_another_command_does_not_resume(
    tmp_path: Path,
    command: list[str],
    expected_files: dict[str, bytes],
    change: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run_half(command)
    if change == "flags":
        command.remove("--append-eod")
    elif change == "input":
        with (tmp_path / "b.jsonl").open("a") as file:
            file.write('{"text": "more"}\n')
    else:
        os.utime(tmp_path / "tokenizer" / "tokenizer.json", ns=(1, 1))
    assert preprocess_data.main(command) == 0
    assert (
        f"{tmp_path / 'out.partial'} is of other flags or inputs, or not whole: starting anew"
        in capfd.readouterr().err
    )
    first_files = files_of(tmp_path)
    assert (first_files == expected_files) == (change == "tokenizer")
    assert preprocess_data.main([*command, "--overwrite"]) == 0
    assert files_of(tmp_path) == first_files


@pytest.mark.usefixtures("expected_files")
def test_a_run_with_a_pipe_does_not_resume(tmp_path: Path, command: list[str]) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    command = ["--input", str(pipe), *command[3:], "--on-error", "stop"]
    for content, code in ((b"{bad\n", 2), (b'{"text": "more"}\n', 0)):
        process = start_process(lambda: preprocess_data.main(command))
        with pipe.open("wb") as file:
            file.write(b'{"text": "the beginning"}\n' * 500 + content)
        process.join(60)
        assert process.exitcode == code
        assert not (tmp_path / "out.partial").exists()
    assert len(files_of(tmp_path)["out_text_document.idx"]) == 34 + 20 * 501 + 8


def test_a_faulty_document_does_not_lose_the_work_before_it(
    tmp_path: Path,
    command: list[str],
    expected_files: dict[str, bytes],
    capfd: pytest.CaptureFixture[str],
) -> None:
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    first_bad = lines.index("{bad") + 1
    with pytest.raises(ConfigError, match=f"^line {first_bad} of .*a.jsonl is not JSON"):
        preprocess_data.main([*command, "--on-error", "stop"])
    assert f"{tmp_path / 'out.partial'} keeps " in capfd.readouterr().err
    assert files_of(tmp_path) == {}
    assert preprocess_data.main(command) == 0
    assert "resuming in" in capfd.readouterr().err
    assert files_of(tmp_path) == expected_files


def test_output_is_replaced_only_on_request(
    tmp_path: Path, command: list[str], expected_files: dict[str, bytes]
) -> None:
    for name in expected_files:
        (tmp_path / name).write_bytes(b"old")
        with pytest.raises(ConfigError, match=f"{name} is there already; add --overwrite to"):
            preprocess_data.main(command)
        assert files_of(tmp_path) == {name: b"old"}
        (tmp_path / name).unlink()
    for name in expected_files:
        (tmp_path / name).write_bytes(b"old")
    assert preprocess_data.main([*command, "--overwrite"]) == 0
    assert files_of(tmp_path) == expected_files
    with pytest.raises(ConfigError, match="is there already"):
        preprocess_data.main(command)
    assert files_of(tmp_path) == expected_files
    assert not (tmp_path / "out.partial").exists()
    # Without --on-error there is no report, and an old report is removed.
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n')
    good_command = ["--input", str(tmp_path / "a.jsonl"), *command[3:-2], "--overwrite"]
    assert preprocess_data.main(good_command) == 0
    assert sorted(files_of(tmp_path)) == ["out_text_document.bin", "out_text_document.idx"]


@pytest.mark.usefixtures("expected_files")
def test_a_second_run_of_a_prefix_is_refused(tmp_path: Path, command: list[str]) -> None:
    os.mkfifo(tmp_path / "pipe")
    slow_command = ["--input", str(tmp_path / "pipe"), *command[3:]]
    first_run = start_process(lambda: preprocess_data.main(slow_command))
    with (tmp_path / "pipe").open("wb") as pipe:
        deadline = time.monotonic() + HANGS
        while not (tmp_path / "out.partial" / "command.json").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with pytest.raises(ConfigError, match=r"out.partial is being written by another run; wait"):
            preprocess_data.main(command)
        pipe.write(b'{"text": "first"}\n')
    first_run.join(HANGS)
    assert first_run.exitcode == 0
    assert preprocess_data.main([*command, "--overwrite"]) == 0


def test_a_lock_in_a_removed_folder_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first run ends after the second run has opened the lock file and before it locks it."""
    lockf = fcntl.lockf

    def lock_removed_file(file: Any, how: int) -> None:
        (tmp_path / "out.partial" / "lock").unlink()
        lockf(file, how)

    monkeypatch.setattr(fcntl, "lockf", lock_removed_file)
    with pytest.raises(ConfigError, match="is being written by another run"):
        RunState(str(tmp_path / "out"), [], {}, print)


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_run_resumes_after_a_full_disk(
    tmp_path: Path,
    command: list[str],
    expected_files: dict[str, bytes],
    processes: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    size = len(expected_files["out_text_document.bin"])

    def run() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))
        return preprocess_data.main([*command, "--workers", processes])

    process = start_process(run)
    process.join(60)
    assert process.exitcode == 2
    sentence = capfd.readouterr().err.splitlines()[-1]
    assert sentence.startswith(f"error: {tmp_path / 'out.partial'} has no room (File too large); ")
    assert sentence.endswith("free some and give the same command, which resumes where it stopped")
    assert files_of(tmp_path) == {}
    assert preprocess_data.main(command) == 0
    assert "resuming in" in capfd.readouterr().err
    assert files_of(tmp_path) == expected_files


def test_a_run_resumes_after_a_killed_worker(
    tmp_path: Path,
    command: list[str],
    expected_files: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from megatron_sffn.data.tokenize.encoder import Encoder

    encode, main_process = Encoder.__call__, os.getpid()

    def encode_or_die(encoder: Encoder, chunks: Any) -> Any:
        if chunks[0].number > 50 and os.getpid() != main_process:
            os.kill(os.getpid(), signal.SIGKILL)
        return encode(encoder, chunks)

    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "__call__", encode_or_die)
        with pytest.raises(
            ConfigError, match=r"one of the --workers 3 processes was killed, .*; us"
        ):
            preprocess_data.main([*command, "--workers", "3"])
    assert preprocess_data.main(command) == 0
    assert files_of(tmp_path) == expected_files


def test_an_interrupted_run_resumes(
    tmp_path: Path,
    command: list[str],
    expected_files: dict[str, bytes],
    capfd: pytest.CaptureFixture[str],
) -> None:
    save, remaining_saves = RunState.save, iter(range(9))

    def save_or_interrupt(run_state: RunState, state: State) -> None:
        save(run_state, state)
        if next(remaining_saves, None) is None:
            signal.raise_signal(signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunState, "save", save_or_interrupt)
        assert preprocess_data.main(command) == 130
    assert "interrupted; the same command resumes" in capfd.readouterr().err
    assert preprocess_data.main(command) == 0
    assert files_of(tmp_path) == expected_files


def test_a_run_interrupted_before_the_first_save_starts_anew(
    tmp_path: Path,
    command: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(preprocess, "sample_texts", interrupt)
    assert preprocess_data.main(command) == 130
    assert "interrupted; the same command starts anew" in capfd.readouterr().err
    assert not list(tmp_path.glob("*.partial"))


def test_memory_does_not_grow_with_the_number_of_documents(tmp_path: Path) -> None:
    import tracemalloc

    def make_column(number: int) -> Column:
        lengths = numpy.full(1000, 2, numpy.int32)
        ids = numpy.arange(2000, dtype=numpy.uint16) + number
        return Column(ids=ids, lengths=lengths, counts=numpy.ones(1000, numpy.int32))

    tracemalloc.start()
    try:
        writer = DatasetWriter(tmp_path, "ours", numpy.uint16, {})
        for number in range(300):
            writer.add(make_column(number))
        writer_peak = tracemalloc.get_traced_memory()[0]
        writer.finish()
        writer.close()
        tracemalloc.reset_peak()
        builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=numpy.uint16)
        builder_start = tracemalloc.get_traced_memory()[0]
        for number in range(300):
            for ids in make_column(number).ids.reshape(1000, 2):
                builder.add_document(ids, [2])
        builder_growth = tracemalloc.get_traced_memory()[0] - builder_start
    finally:
        tracemalloc.stop()
    builder.finalize(str(tmp_path / "theirs.idx"))
    for ending in ("bin", "idx"):
        assert (tmp_path / f"ours.{ending}").read_bytes() == (
            tmp_path / f"theirs.{ending}"
        ).read_bytes()
    assert writer_peak < 5_000_000  # three buffers
    assert builder_growth > 300_000 * 16  # so there were enough documents to show growth
