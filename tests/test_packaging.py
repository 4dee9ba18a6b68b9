"""The wheel is built, installed into an empty environment, and used outside of a clone."""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from megatron_sffn.cli import commands
from tests.support.paths import ROOT

TOOLS = [name for name in commands() if name != "pretrain"]
RUN = """
    --num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 32
    --max-position-embeddings 32 --position-embedding-type rope --disable-bias-linear
    --tokenizer-type NullTokenizer --vocab-size 64 --make-vocab-size-divisible-by 64 --mock-data
    --micro-batch-size 2 --global-batch-size 4 --lr 1e-3 --train-iters 5 --eval-iters 1
    --num-workers 0 --sffn-block-size 8 --sffn-expansion 4 --save saved --save-interval 5
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel that is built from a copy of the tree, because setuptools leaves a folder there."""
    source = tmp_path_factory.mktemp("source")
    wheel_folder = tmp_path_factory.mktemp("wheel")
    for name in ("megatron_sffn", "tools"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip("wheel", "--no-build-isolation", "--wheel-dir", wheel_folder, source)
    (path,) = wheel_folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel, which uses the dependencies of this environment."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    pip("--python", folder / "bin" / "python", "install", wheel)
    (packages,) = folder.glob("lib/python*/site-packages")
    # Python searches a folder of a .pth file, but ignores its own .pth files, such as that of the
    # clone.
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()))
    return folder


def pip(*arguments: object) -> None:
    """Run pip without the network."""
    command = [sys.executable, "-m", "pip", "--no-input", "--disable-pip-version-check", *arguments]
    command += ["--no-deps", "--no-index"]
    process = subprocess.run(
        [str(argument) for argument in command], capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr


def run_outside(environment: Path, folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the environment in another folder."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    path = os.pathsep.join([str(environment / "bin"), os.environ["PATH"]])
    return subprocess.run(
        [str(environment / "bin" / command[0]), *command[1:]],
        cwd=folder,
        env={**variables, "PATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def test_the_wheel_holds_only_sources_and_tools(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "megatron_sffn").rglob("*")
        if path.suffix in (".py", ".cpp", ".jinja")
    }
    expected |= {f"megatron_sffn/tools/{path.name}" for path in (ROOT / "tools").glob("*.py")}
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert any(name.endswith(".cpp") for name in names)


def test_no_extra_installs_apex_and_the_constraints_forbid_it() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    requirements = [
        *project["dependencies"],
        *(requirement for extra in extras.values() for requirement in extra),
    ]
    assert "apex" not in {Requirement(requirement).name for requirement in requirements}
    assert {"te", "dali", "ray", "plot", "wandb", "dev"} <= extras.keys()
    assert "apex<0" in (ROOT / "constraints.txt").read_text().splitlines()


def test_pip_refuses_apex_under_the_constraints(tmp_path: Path) -> None:
    package = tmp_path / "apex-0.9.10-py3-none-any.whl"
    info = "apex-0.9.10.dist-info"
    with zipfile.ZipFile(package, "w") as file:
        file.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: apex\nVersion: 0.9.10\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "--no-deps"]
    command += ["--ignore-installed", "--find-links", str(tmp_path), "apex"]
    assert subprocess.run(command, capture_output=True).returncode == 0
    constraints = ["-c", str(ROOT / "constraints.txt")]
    process = subprocess.run([*command, *constraints], capture_output=True, text=True)
    assert process.returncode != 0
    assert "(constraint) apex<0" in process.stdout


@pytest.mark.parametrize("arguments", [["megatron-sffn"], ["python", "-m", "megatron_sffn"]])
def test_the_console_script_lists_every_tool(
    environment: Path, tmp_path: Path, arguments: list[str]
) -> None:
    process = run_outside(environment, tmp_path, *arguments)
    assert process.returncode == 0, process.stderr
    assert all(f"\n  {name} " in process.stdout for name in commands())


@pytest.mark.parametrize("tool", TOOLS)
def test_every_tool_starts_outside_the_clone(environment: Path, tmp_path: Path, tool: str) -> None:
    process = run_outside(environment, tmp_path, "megatron-sffn", tool, "--help")
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("usage: ")


@pytest.mark.parametrize("arguments", [["nonsense"], ["merge-datasets", "--nonsense"]])
def test_bad_input_is_reported_in_one_sentence(
    environment: Path, tmp_path: Path, arguments: list[str]
) -> None:
    process = run_outside(environment, tmp_path, "megatron-sffn", *arguments)
    assert process.returncode == 2
    assert process.stderr.startswith("error: ")
    assert process.stderr.count("\n") == 1


def test_the_installed_package_can_train(environment: Path, tmp_path: Path) -> None:
    location = run_outside(
        environment, tmp_path, "python", "-c", "import megatron_sffn as m; print(m)"
    )
    assert str(environment) in location.stdout, location
    process = run_outside(environment, tmp_path, "megatron-sffn", "pretrain", *RUN.split())
    assert process.returncode == 0, process.stdout + process.stderr
    assert json.loads((tmp_path / "saved" / "summary.json").read_text())["iterations"] == 5
    # A tool reads the checkpoint of the run.
    converted = run_outside(
        environment,
        tmp_path,
        *("megatron-sffn", "convert-checkpoint", "reblock", "--load", "saved"),
        *("--save", "finer", "--block-size", "4", "--no-evaluate"),
    )
    assert converted.returncode == 0, converted.stderr
    assert (tmp_path / "finer" / "iter_0000005" / ".metadata").is_file()
