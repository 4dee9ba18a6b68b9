"""A Ray cluster of two machines makes the files of one, also after losses."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Any

import preprocess_data
import psutil
import pytest

from megatron_sffn.utils.errors import ConfigError
from tests.support.processes import HANGS

RAY = str(Path(sys.executable).with_name("ray"))


class Machine:
    """A machine as far as Ray knows, with one CPU; Ray itself stays out of this process."""

    def __init__(self, folder: Path, *flags: str) -> None:
        one_cpu = ["--num-cpus=1", "--object-store-memory=100000000"]
        several = ["--node-ip-address=127.0.0.1", "--min-worker-port=0", "--max-worker-port=0"]
        self._process = psutil.Popen(
            [RAY, "start", "--chunk", "--disable-usage-stats", *one_cpu, *several, *flags],
            env={**os.environ, "RAY_TMPDIR": str(folder)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        wait_for(self._process.stdout, "Ray runtime started.")

    def workers(self) -> list[psutil.Process]:
        """Its processes that encode."""
        processes = self._process.children(recursive=True)
        return [one for one in processes if one.cmdline()[:1] == ["ray::_encode"]]

    def vanish(self) -> None:
        """Lose its power."""
        if self._process.poll() is None:
            processes = [self._process, *self._process.children(recursive=True)]
            for process in processes:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(processes)
            self._process.stdout.close()


class Machines(list[Machine]):
    """Those of a cluster, the head first."""

    def __init__(self, folder: Path) -> None:
        self._folder, port = folder, free_port()
        self.address = f"127.0.0.1:{port}"
        self.append(Machine(folder, "--head", f"--port={port}", "--include-dashboard=false"))
        self.add()

    def add(self) -> None:
        self.append(Machine(self._folder, f"--address={self.address}"))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + HANGS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def wait_for(stream: IO[str], words: str) -> str:
    """What a process says until it says `words`."""
    said = ""
    for line in stream:
        said += line
        if words in line:
            return said
    raise AssertionError(said)


@pytest.fixture
def start(start_tool: Any) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts the tool, or a script like it; a test that fails leaves none."""
    with ExitStack() as stack:

        def start(script: str | Path, *arguments: object) -> subprocess.Popen[str]:
            process: subprocess.Popen[str] = start_tool(script, *arguments)
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield start


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:  # names of sockets
        made = Machines(Path(folder))
        yield made
        for machine in reversed(made):
            machine.vanish()


@pytest.fixture
def command(tmp_path: Path, tokenizer_folder: Path, texts: list[str]) -> list[str]:
    """Of 20 MB of words, which is work for some seconds."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnop", k=6)) for _ in range(20_000)]
    with (tmp_path / "a.jsonl").open("w") as file:
        for number in range(6_000):
            text = " ".join(rng.choices(words, k=500)) + texts[number % len(texts)]
            file.write(json.dumps({"text": text}) + "\n")
            if number % 1000 == 7:
                file.write("{bad\n")
    tokenizer = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model"]
    return [
        *["--input", str(tmp_path / "a.jsonl"), *tokenizer, str(tokenizer_folder)],
        *["--append-eod", "--on-error", "skip", "--log-interval", "100"],
    ]


def prefix(tmp_path: Path, name: str) -> list[str]:
    return ["--output-prefix", str(tmp_path / name)]


def files_of(folder: Path, name: str) -> dict[str, bytes]:
    return {path.name.removeprefix(name): path.read_bytes() for path in folder.glob(f"{name}_*")}


@pytest.fixture
def expected(tmp_path: Path, command: list[str]) -> dict[str, bytes]:
    assert preprocess_data.main([*command, *prefix(tmp_path, "here"), "--workers", "2"]) == 0
    return files_of(tmp_path, "here")


def test_files_are_the_same_after_losing_a_machine_and_a_worker(
    tmp_path: Path,
    command: list[str],
    expected: dict[str, bytes],
    machines: Machines,
    start: Any,
) -> None:
    at = ["--engine", "megatron", "--ray", machines.address]
    process = start("preprocess_data.py", *command, *prefix(tmp_path, "ray"), *at)
    said = wait_for(process.stderr, "processed ")
    assert f"2 CPUs on 2 machines of the Ray cluster {machines.address}" in said
    machines.pop().vanish()
    wait_until(machines[0].workers)
    for worker in machines[0].workers():
        worker.kill()
    machines.add()
    out, err = process.communicate(timeout=HANGS)
    assert process.returncode == 0, err
    assert "ray_text_document: 6000 documents" in out and "6 documents left out" in out
    assert files_of(tmp_path, "ray") == expected
    assert err.splitlines()[-1].count(" MB on ") >= 2, "more than one machine takes part"


def test_a_failed_command_resumes_without_ray(
    tmp_path: Path,
    command: list[str],
    expected: dict[str, bytes],
    machines: Machines,
    start: Any,
    capfd: pytest.CaptureFixture[str],
) -> None:
    script = tmp_path / "impatient.py"
    script.write_text(
        "from megatron_sffn.data.tokenize import preprocess, ray_workers\n"
        "from megatron_sffn.tools import preprocess_data\n"
        "from megatron_sffn.utils.errors import run_command\n"
        "ray_workers.TRIES = 0\n"
        # The text is encoded in less than the ten seconds between two saves.
        "preprocess.SAVE_SECONDS = 0\n"
        "run_command(preprocess_data.main)\n"
    )
    at = ["--engine", "megatron", "--ray", machines.address]
    process = start(script, *command, *prefix(tmp_path, "ray"), *at)
    wait_for(process.stderr, "M tokens, ")
    wait_for(process.stderr, "M tokens, ")  # a save follows each line
    for machine in machines:
        for worker in machine.workers():
            worker.kill()
    out, err = process.communicate(timeout=HANGS)
    assert process.returncode == 2, out
    assert "error: Ray gave up the text from line " in err.splitlines()[-1]
    assert files_of(tmp_path, "ray") == {}
    assert preprocess_data.main([*command, *prefix(tmp_path, "ray"), "--workers", "1"]) == 0
    assert "resuming in" in capfd.readouterr().err
    assert files_of(tmp_path, "ray") == expected


def test_another_tokenizer_on_a_machine_is_refused(
    tmp_path: Path, command: list[str], machines: Machines, start: Any, tokenizer_folder: Path
) -> None:
    """The file changes after it was read here, as it would differ on another disk."""
    folder = shutil.copytree(tokenizer_folder, tmp_path / "tokenizer")
    command[command.index(str(tokenizer_folder))] = str(folder)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    command[command.index(str(tmp_path / "a.jsonl"))] = str(pipe)
    given = [*command, *prefix(tmp_path, "ray"), "--ray", machines.address]
    process = start("preprocess_data.py", *given)
    with pipe.open("wb") as file:  # which waits until the command reads
        (folder / "added.txt").write_text("more")
        file.write(b'{"text": "first"}\n')
    out, err = process.communicate(timeout=HANGS)
    assert process.returncode == 2, out
    assert err.splitlines()[-1].startswith("error: on ")
    assert "): the tokenizer is another than where the command was given; copy its files" in err
    assert not files_of(tmp_path, "ray") and not (tmp_path / "ray.partial").exists()


def test_bad_arguments_are_refused(
    tmp_path: Path, command: list[str], machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [*command, *prefix(tmp_path, "ray")]
    before = set(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=r"--workers 2 counts .* --ray auto uses all CPUs of a"):
        preprocess_data.main([*given, "--ray", "--workers", "2"])
    for address in ("127.0.0.1:1", "somewhere", "localhost:port"):
        with pytest.raises(ConfigError, match=f"--ray {address} leads to no cluster .*; start one"):
            preprocess_data.main([*given, "--ray", address])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="--ray needs ray, which is not installed; pip install"):
        preprocess_data.main([*given, "--ray"])
    assert set(tmp_path.iterdir()) == before
