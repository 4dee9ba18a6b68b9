"""A Ray cluster writes the files of a single machine, also after it loses a machine."""

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
    """A Ray node with one CPU, in processes of its own; this process does not import Ray."""

    def __init__(self, folder: Path, *flags: str) -> None:
        one_cpu = ["--num-cpus=1", "--object-store-memory=100000000"]
        local_ports = ["--node-ip-address=127.0.0.1", "--min-worker-port=0", "--max-worker-port=0"]
        self._process = psutil.Popen(
            [RAY, "start", "--block", "--disable-usage-stats", *one_cpu, *local_ports, *flags],
            env={**os.environ, "RAY_TMPDIR": str(folder)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        wait_for(self._process.stdout, "Ray runtime started.")

    def workers(self) -> list[psutil.Process]:
        """The processes that encode."""
        processes = self._process.children(recursive=True)
        return [process for process in processes if process.cmdline()[:1] == ["ray::_encode"]]

    def vanish(self) -> None:
        """Kill all processes at once, like a power failure."""
        if self._process.poll() is None:
            processes = [self._process, *self._process.children(recursive=True)]
            for process in processes:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(processes)
            self._process.stdout.close()


class Cluster(list[Machine]):
    """The machines of a cluster, the head first."""

    def __init__(self, folder: Path) -> None:
        self._folder, port = folder, free_port()
        self.address = f"127.0.0.1:{port}"
        self.append(Machine(folder, "--head", f"--port={port}", "--include-dashboard=false"))
        self.add()

    def add(self) -> None:
        self.append(Machine(self._folder, f"--address={self.address}"))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + HANGS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def wait_for(stream: IO[str], pattern: str) -> str:
    """Read the output of a process until a line contains `pattern`."""
    output = ""
    for line in stream:
        output += line
        if pattern in line:
            return output
    raise AssertionError(output)


@pytest.fixture
def start(start_tool: Any) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts the tool or a similar script; the process is killed when the test ends."""
    with ExitStack() as stack:

        def start(script: str | Path, *arguments: object) -> subprocess.Popen[str]:
            process: subprocess.Popen[str] = start_tool(script, *arguments)
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield start


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(
        prefix="ray-", dir="/tmp"
    ) as folder:  # names of sockets must be short
        cluster = Cluster(Path(folder))
        yield cluster
        for machine in reversed(cluster):
            machine.vanish()


@pytest.fixture
def command(tmp_path: Path, tokenizer_folder: Path, texts: list[str]) -> list[str]:
    """Flags of a run over 20 MB of words, which takes some seconds."""
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


def output_flags(tmp_path: Path, name: str) -> list[str]:
    return ["--output-prefix", str(tmp_path / name)]


def files_of(folder: Path, name: str) -> dict[str, bytes]:
    return {path.name.removeprefix(name): path.read_bytes() for path in folder.glob(f"{name}_*")}


@pytest.fixture
def expected_files(tmp_path: Path, command: list[str]) -> dict[str, bytes]:
    assert preprocess_data.main([*command, *output_flags(tmp_path, "here"), "--workers", "2"]) == 0
    return files_of(tmp_path, "here")


# It takes a minute; the next test compares files that Ray has written as well.
@pytest.mark.slow
def test_files_are_the_same_after_losing_a_machine_and_a_worker(
    tmp_path: Path,
    command: list[str],
    expected_files: dict[str, bytes],
    cluster: Cluster,
    start: Any,
) -> None:
    ray_flags = ["--engine", "megatron", "--ray", cluster.address]
    process = start("preprocess_data.py", *command, *output_flags(tmp_path, "ray"), *ray_flags)
    log = wait_for(process.stderr, "processed ")
    assert f"2 CPUs on 2 machines of the Ray cluster {cluster.address}" in log
    cluster.pop().vanish()
    wait_until(cluster[0].workers)
    for worker in cluster[0].workers():
        worker.kill()
    cluster.add()
    stdout, stderr = process.communicate(timeout=HANGS)
    assert process.returncode == 0, stderr
    assert "ray_text_document: 6000 documents" in stdout and "6 documents left out" in stdout
    assert files_of(tmp_path, "ray") == expected_files
    assert stderr.splitlines()[-1].count(" MB on ") >= 2, "more than one machine takes part"


def test_a_failed_command_resumes_without_ray(
    tmp_path: Path,
    command: list[str],
    expected_files: dict[str, bytes],
    cluster: Cluster,
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
    ray_flags = ["--engine", "megatron", "--ray", cluster.address]
    process = start(script, *command, *output_flags(tmp_path, "ray"), *ray_flags)
    wait_for(process.stderr, "M tokens, ")
    wait_for(process.stderr, "M tokens, ")  # a save follows each line
    for machine in cluster:
        for worker in machine.workers():
            worker.kill()
    stdout, stderr = process.communicate(timeout=HANGS)
    assert process.returncode == 2, stdout
    assert "error: Ray gave up the text from line " in stderr.splitlines()[-1]
    assert files_of(tmp_path, "ray") == {}
    assert preprocess_data.main([*command, *output_flags(tmp_path, "ray"), "--workers", "1"]) == 0
    assert "resuming in" in capfd.readouterr().err
    assert files_of(tmp_path, "ray") == expected_files


def test_a_machine_with_another_tokenizer_is_refused(
    tmp_path: Path, command: list[str], cluster: Cluster, start: Any, tokenizer_folder: Path
) -> None:
    """The tokenizer changes after this machine has read it, as if another disk had another one."""
    folder = shutil.copytree(tokenizer_folder, tmp_path / "tokenizer")
    command[command.index(str(tokenizer_folder))] = str(folder)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    command[command.index(str(tmp_path / "a.jsonl"))] = str(pipe)
    ray_command = [*command, *output_flags(tmp_path, "ray"), "--ray", cluster.address]
    process = start("preprocess_data.py", *ray_command)
    with pipe.open("wb") as file:  # open() returns when the command reads
        (folder / "added.txt").write_text("more")
        file.write(b'{"text": "first"}\n')
    stdout, stderr = process.communicate(timeout=HANGS)
    assert process.returncode == 2, stdout
    assert stderr.splitlines()[-1].startswith("error: on ")
    assert "): the tokenizer is another than where the command was given; copy its files" in stderr
    assert not files_of(tmp_path, "ray") and not (tmp_path / "ray.partial").exists()


def test_bad_arguments_are_refused(
    tmp_path: Path, command: list[str], cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    valid_command = [*command, *output_flags(tmp_path, "ray")]
    files_before = set(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=r"--workers 2 counts .* --ray auto uses all CPUs of a"):
        preprocess_data.main([*valid_command, "--ray", "--workers", "2"])
    for address in ("127.0.0.1:1", "somewhere", "localhost:port"):
        with pytest.raises(ConfigError, match=f"--ray {address} leads to no cluster .*; start one"):
            preprocess_data.main([*valid_command, "--ray", address])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="--ray needs ray, which is not installed; pip install"):
        preprocess_data.main([*valid_command, "--ray"])
    assert set(tmp_path.iterdir()) == files_before
