"""tools/setup_env.sh, with fake interpreters: nothing is downloaded or installed.

A fake python answers the calls of the script (its version, `-m venv`, `-m pip index`, `-m pip
install`) and records every install, so that a test can tell what would have been installed.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.processes import HANGS

SCRIPT = ROOT / "tools" / "setup_env.sh"
# The commands that the script may use. A PATH of links to them hides the pythons of the machine.
COMMANDS = "awk bash cat cksum cp dirname du flock grep mkdir rm sed sh sleep sort tee tr".split()  # noqa: SIM905
PYPROJECT = """
[project.optional-dependencies]
dev = ["ruff"]
plot = ["matplotlib"]
ray = ["ray"]
"""

FAKE_PYTHON = """#!/bin/sh
case "$1 $2" in
"-c "*) echo "{version} $0" ;;
"-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && echo "version = {version}" >"$3/pyvenv.cfg" ;;
"-m pip")
    if [ "$3" = index ]; then echo "Available versions: 2.14.0, $TORCH_VERSIONS"; exit; fi
    echo "{version} $*" >>"$CALLS"
    echo "Downloading torch-2.13.0-cp312-cp312-manylinux.whl (526.6 MB)"
    echo "Downloading torch-2.13.0-cp312-cp312-manylinux.whl.metadata (999 MB)"
    echo "Using cached triton-3.7.1-cp312-cp312-manylinux.whl (201.5 MB)"
    echo "  Downloading tqdm-4.70.1-py3-none-any.whl (78 kB)"
    echo "Successfully installed torch-2.13.0 tqdm-4.70.1 triton-3.7.1"
    [ -z "$PIP_ERROR" ] || {{ echo "ERROR: $PIP_ERROR" >&2; exit 1; }}
    ;;
esac
"""  # noqa: E501


@dataclass(frozen=True)
class Checkout:
    """A project with the real script and a PATH that holds only the files of a test."""

    root: Path
    bin: Path
    home: Path

    def python(self, name: str, version: str) -> Path:
        path = self.home / name if "/" in name else self.bin / name
        return write_command(path, FAKE_PYTHON.format(version=version))

    def start(self, *extras: str, **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [self.root / "tools" / "setup_env.sh", *extras],
            env={"PATH": str(self.bin), "HOME": str(self.home), "CALLS": str(self.calls)} | env,
            cwd=self.home,  # the script must find its folder by itself
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # so that a test can kill it with its children
        )

    def setup(self, *extras: str, **env: str) -> subprocess.CompletedProcess[str]:
        with self.start(*extras, **env) as process:
            stdout, stderr = process.communicate(timeout=HANGS)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    @property
    def calls(self) -> Path:
        return self.root / "calls"

    def installs(self) -> list[str]:
        """The version of the python of each `pip install`, in order."""
        return [line.split()[0] for line in self.calls.read_text().splitlines()]

    def requirements(self) -> list[str]:
        """What each `pip install` was asked for, behind the option for an editable install."""
        return [line.split(" -e ")[1] for line in self.calls.read_text().splitlines()]


def write_command(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    root, bin_, home = (tmp_path / name for name in ("a checkout", "bin", "home"))
    for folder in (root / "tools", bin_, home):
        folder.mkdir(parents=True)
    shutil.copy(SCRIPT, root / "tools")
    (root / "pyproject.toml").write_text(PYPROJECT)
    (root / "constraints.txt").write_text("torch==2.13.0\n")
    (root / "calls").touch()
    for name in COMMANDS:
        if path := shutil.which(name):
            (bin_ / name).symlink_to(path)
    write_command(bin_ / "df", df_script(free_gb=100))  # independent of the disk of this machine
    return Checkout(root, bin_, home)


def df_script(free_gb: int) -> str:
    return f"#!/bin/sh\necho head\necho disk 1 1 {free_gb * 1024 * 1024} 1% /\n"


def assert_one_sentence(result: subprocess.CompletedProcess[str], *phrases: str) -> None:
    assert result.returncode != 0
    (line,) = result.stderr.splitlines()
    assert line.startswith("setup: ") and line.endswith(".")
    for phrase in phrases:
        assert phrase in line


@pytest.mark.parametrize(
    ("installed", "expected"),
    [
        ({"python3.12": "3.12.1", "python3.13": "3.13.0", "python3": "3.12.9"}, "3.12.1"),
        ({"python3.13": "3.13.0", "python3": "3.12.9"}, "3.13.0"),
        ({"python3": "3.12.9", ".pyenv/versions/3.13.0/bin/python": "3.13.0"}, "3.12.9"),
        ({"python3": "3.14.0", ".pyenv/versions/3.12.1/bin/python": "3.12.1"}, "3.12.1"),
        (
            {
                "python3": "3.11.7",
                ".pyenv/versions/3.9.1/bin/python": "3.9.1",
                ".pyenv/versions/3.12.11/bin/python": "3.12.11",
                ".pyenv/versions/3.13.2/bin/python": "3.13.2",
                ".pyenv/versions/3.13.10/bin/python": "3.13.10",
                ".pyenv/versions/3.13.11rc1/bin/python": "3.13.11rc1",
                ".pyenv/versions/3.14.0/bin/python": "3.14.0",
            },
            "3.13.10",
        ),
    ],
)
def test_the_newest_supported_python_in_search_order_is_used(
    checkout: Checkout, installed: dict[str, str], expected: str
) -> None:
    for name, version in installed.items():
        checkout.python(name, version)
    result = checkout.setup()
    assert (result.returncode, result.stderr) == (0, "")
    assert checkout.installs() == [expected]


def test_broken_pyenv_shims_are_skipped(checkout: Checkout) -> None:
    shim = "#!/bin/sh\necho 'pyenv: python3.12: command not found' >&2\nexit 127\n"
    write_command(checkout.bin / "python3.12", shim)
    checkout.python("elsewhere/versions/3.12.1/bin/python", "3.12.1")
    result = checkout.setup(PYENV_ROOT=str(checkout.home / "elsewhere"))
    assert (result.returncode, result.stderr) == (0, "")
    assert checkout.installs() == ["3.12.1"]


def test_a_named_python_is_used_first(checkout: Checkout) -> None:
    checkout.python("python3.12", "3.12.1")
    named = checkout.python("opt/python", "3.13.0")
    assert checkout.setup(PYTHON=str(named)).returncode == 0
    assert checkout.installs() == ["3.13.0"]


@pytest.mark.parametrize("version", ["3.11.7", "3.14.0"])
def test_a_named_python_of_an_unsupported_version_is_refused(
    checkout: Checkout, version: str
) -> None:
    checkout.python("python3.12", "3.12.1")
    checkout.python("other", version)
    assert_one_sentence(checkout.setup(PYTHON="other"), "PYTHON=other", version, "3.12 or 3.13")
    assert not (checkout.root / ".venv").exists()


def test_a_named_python_that_does_not_run_is_refused(checkout: Checkout) -> None:
    checkout.python("python3.12", "3.12.1")
    assert_one_sentence(checkout.setup(PYTHON="/none"), "PYTHON=/none does not run")


def test_a_missing_python_is_reported(checkout: Checkout) -> None:
    checkout.python("python3", "3.11.7")
    assert_one_sentence(checkout.setup(), "no Python 3.12 or 3.13", "apt-get install", "pyenv")
    assert not (checkout.root / ".venv").exists()


def test_too_little_disk_space_is_reported(checkout: Checkout) -> None:
    checkout.python("python3.12", "3.12.1")
    write_command(checkout.bin / "df", df_script(free_gb=6))
    assert_one_sentence(checkout.setup("plot"), "6 GB are free", "8 GB")
    assert_one_sentence(checkout.setup("plot", "dev"), "6 GB are free", "10 GB")
    assert checkout.installs() == []
    assert not (checkout.root / ".venv").exists()


def test_a_missing_venv_module_is_reported(checkout: Checkout) -> None:
    no_venv = "#!/bin/sh\n[ $1 = -c ] && echo 3.12.1 $0 || { echo No module named venv; exit 1; }\n"
    write_command(checkout.bin / "python3.12", no_venv)
    assert_one_sentence(checkout.setup(), "virtual environment", "python3.12-venv", "setup.log")


def test_a_second_call_installs_nothing(checkout: Checkout) -> None:
    checkout.python("python3.12", "3.12.1")
    first_call = checkout.setup()
    assert "torch" in first_call.stdout and "tqdm" not in first_call.stdout, (
        "only what takes long is shown"
    )
    report = first_call.stdout.splitlines()[-1]
    assert report.startswith("setup: 3 packages in ")
    assert "0.53 GB downloaded, 0.20 GB from the cache of pip; .venv has 0.0 GB" in report
    write_command(checkout.bin / "df", df_script(free_gb=0))  # called only before an install
    (checkout.bin / "python3.12").unlink()
    second_call = checkout.setup()
    assert (second_call.returncode, second_call.stdout, second_call.stderr) == (0, "", "")
    assert len(checkout.installs()) == 1


def test_another_named_python_replaces_the_environment(checkout: Checkout) -> None:
    python312, python313 = (
        checkout.python(f"python3.{minor}", f"3.{minor}.1") for minor in (12, 13)
    )
    checkout.setup()
    checkout.setup(PYTHON=str(python312))
    assert checkout.installs() == ["3.12.1"]
    assert checkout.setup(PYTHON=str(python313)).returncode == 0
    checkout.setup()
    assert checkout.installs() == ["3.12.1", "3.13.1"]


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt", "tools/setup_env.sh"])
def test_changed_requirements_update_in_place(checkout: Checkout, name: str) -> None:
    checkout.python("python3.12", "3.12.1")
    checkout.setup()
    existing_file = checkout.root / ".venv" / "kept"
    existing_file.touch()
    with (checkout.root / name).open("a") as file:
        file.write("# changed\n")
    assert "updating" in checkout.setup().stdout
    assert checkout.setup().stdout == ""
    assert len(checkout.installs()) == 2
    assert existing_file.exists()


def test_a_light_environment_is_extended_in_place(checkout: Checkout) -> None:
    checkout.python("python3.12", "3.12.1")
    checkout.setup("plot")
    existing_file = checkout.root / ".venv" / "kept"
    existing_file.touch()
    assert ", so that it has dev plot" in checkout.setup("plot", "dev").stdout
    assert checkout.setup("plot").stdout == "", "a full environment has all of a light one"
    assert checkout.setup("ray").returncode == 0
    assert checkout.setup("dev", "ray").stdout == ""
    (checkout.root / "constraints.txt").write_text("changed\n")
    checkout.setup("plot")
    assert checkout.requirements() == [
        ".[plot]",
        ".[dev,plot]",
        ".[dev,plot,ray]",
        ".[dev,plot,ray]",
    ]
    assert existing_file.exists()


def test_an_unknown_extra_is_refused(checkout: Checkout) -> None:
    checkout.python("python3.12", "3.12.1")
    assert_one_sentence(checkout.setup("plot", "rey"), "extra 'rey'", "choose among dev plot ray")
    assert not (checkout.root / ".venv").exists()


NO_GPU = pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="this machine has a GPU")
INDEX = "file:///simple"


@pytest.mark.parametrize(
    ("env", "arguments"),
    [
        pytest.param({}, "torch==2.13.0+cpu", marks=NO_GPU),
        pytest.param(
            {"TORCH_INDEX": INDEX}, f"--extra-index-url {INDEX} torch==2.13.0+cpu", marks=NO_GPU
        ),
        ({"TORCH_BUILD": "cu126"}, "torch==2.13.0+cu126"),
        ({"TORCH_BUILD": ""}, ""),
    ],
)
def test_the_build_of_torch_is_chosen_among_those_of_the_indexes(
    checkout: Checkout, env: dict[str, str], arguments: str
) -> None:
    checkout.python("python3.12", "3.12.1")
    result = checkout.setup(TORCH_VERSIONS="2.13.0+cpu, 2.13.0+cu126, 2.13.0", **env)
    assert (result.returncode, result.stderr) == (0, "")
    assert checkout.requirements() == [f". {arguments}".strip()]
    # It stays as it is, whatever the indexes have later.
    if "+" in arguments:
        build = arguments.rpartition("+")[2]
        packages = checkout.root / ".venv" / "lib" / "python3.12" / "site-packages"
        (packages / f"torch-2.13.0+{build}.dist-info").mkdir(parents=True)
        assert checkout.setup("dev", TORCH_BUILD="").returncode == 0
        assert checkout.requirements()[1] == f".[dev] torch==2.13.0+{build}"


def test_without_a_cpu_build_torch_has_cuda_and_the_script_says_so(checkout: Checkout) -> None:
    checkout.python("python3.12", "3.12.1")
    write_command(checkout.bin / "nvidia-smi", "#!/bin/sh\nexit ${NO_DRIVER:-0}\n")
    assert "CPU build" not in checkout.setup(TORCH_VERSIONS="2.13.0+cpu").stdout
    if not Path("/dev/nvidiactl").exists():
        shutil.rmtree(checkout.root / ".venv")
        result = checkout.setup(TORCH_VERSIONS="2.12.0+cpu, 2.13.0", NO_DRIVER="9")
        assert "no CPU build of torch in the indexes of pip" in result.stdout
        assert "TORCH_INDEX=URL" in result.stdout
    assert set(checkout.requirements()) == {"."}


def test_an_index_without_the_build_is_refused(checkout: Checkout) -> None:
    checkout.python("python3.12", "3.12.1")
    result = checkout.setup(TORCH_VERSIONS="2.13.0", TORCH_BUILD="cu126")
    assert_one_sentence(result, "no index has torch 2.13.0+cu126", "TORCH_INDEX")
    assert checkout.installs() == []


def test_a_failed_install_is_reported_and_the_next_call_repairs_it(checkout: Checkout) -> None:
    checkout.python("python3.12", "3.12.1")
    result = checkout.setup(PIP_ERROR="No matching distribution found for torch")
    assert_one_sentence(result, "No matching distribution found for torch", ".venv/setup.log")
    assert "tqdm" in (checkout.root / ".venv/setup.log").read_text(), "the log has everything"
    leftover = checkout.root / ".venv" / "half-installed"
    leftover.touch()
    assert checkout.setup().returncode == 0
    assert not leftover.exists()
    assert checkout.setup().stdout == ""
    assert len(checkout.installs()) == 2


def test_a_failed_update_is_repeated_in_place(checkout: Checkout) -> None:
    checkout.python("python3.12", "3.12.1")
    checkout.setup()
    (checkout.root / "constraints.txt").write_text("torch<0\n")
    assert_one_sentence(checkout.setup(PIP_ERROR="conflict"), "(conflict)")
    assert "updating" in checkout.setup().stdout
    assert len(checkout.installs()) == 3


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGKILL])
def test_the_next_call_repairs_an_interrupted_update(
    checkout: Checkout, signal_number: signal.Signals
) -> None:
    checkout.python("python3.12", "3.12.1")
    checkout.setup()
    # Like pip, the fake exits with an error after an interrupt.
    slow_python = FAKE_PYTHON.format(version="3.12.1").replace(
        'echo "Down', "trap 'exit 1' INT; sleep 9999 #"
    )
    write_command(checkout.root / ".venv" / "bin" / "python", slow_python)
    (checkout.root / "constraints.txt").write_text("changed\n")
    with checkout.start() as process:
        while len(checkout.installs()) < 2:
            time.sleep(0.01)
        time.sleep(0.05)  # until the trap is set
        os.killpg(process.pid, signal_number)
        _, stderr = process.communicate(timeout=HANGS)
    assert process.returncode != 0
    assert "interrupted" in stderr or signal_number == signal.SIGKILL
    assert "replacing" in checkout.setup().stdout
    assert checkout.setup().stdout == ""
    assert len(checkout.installs()) == 3


def test_a_moved_checkout_is_installed_again(checkout: Checkout) -> None:
    checkout.python("python3.12", "3.12.1")
    checkout.setup()
    moved = replace(checkout, root=checkout.root.rename(checkout.root.parent / "moved"))
    assert "replacing" in moved.setup().stdout
    assert len(moved.installs()) == 2


@pytest.mark.skipif(not shutil.which("flock"), reason="without flock, set-ups are not kept apart")
def test_two_calls_at_once_install_once(checkout: Checkout) -> None:
    slow_python = FAKE_PYTHON.format(version="3.12.1").replace('echo "Down', "sleep 0.2 #")
    write_command(checkout.bin / "python3.12", slow_python)
    with checkout.start() as first_call, checkout.start() as second_call:
        assert (first_call.wait(timeout=HANGS), second_call.wait(timeout=HANGS)) == (0, 0)
    assert len(checkout.installs()) == 1


def test_the_script_is_executable() -> None:
    assert os.access(SCRIPT, os.X_OK)
