"""The wheel: built, installed into an empty environment, used from a folder that is no clone."""

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

from tests.support.paths import ROOT

TOOLS = sorted(path.stem.replace("_", "-") for path in (ROOT / "tools").glob("*.py"))
RUN = """
    --num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 32
    --max-position-embeddings 32 --position-embedding-type rope --disable-bias-linear
    --tokenizer-type NullTokenizer --vocab-size 64 --make-vocab-size-divisible-by 64 --mock-data
    --micro-batch-size 2 --global-batch-size 4 --lr 1e-3 --train-iters 5 --eval-iters 1
    --num-workers 0 --sffn-block-size 8 --sffn-expansion 4 --expert-model-parallel-size 2
    --save saved --save-interval 5
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the tree, as setuptools leaves a folder in the tree that it builds."""
    source = tmp_path_factory.mktemp("source")
    built = tmp_path_factory.mktemp("wheel")
    for name in ("megatron_sffn", "tools"):
        leave = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=leave)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip("wheel", "--no-build-isolation", "--wheel-dir", built, source)
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel alone, whose dependencies are this one's."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    pip("--python", folder / "bin" / "python", "install", wheel)
    (packages,) = folder.glob("lib/python*/site-packages")
    # A folder named in a .pth file is searched; what lies in its own .pth files, such as the
    # clone, is not.
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()))
    return folder


def pip(*words: object) -> None:
    """Without the network."""
    command = [sys.executable, "-m", "pip", "--no-input", "--disable-pip-version-check", *words]
    command += ["--no-deps", "--no-index"]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def outside(environment: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the environment in another folder."""
    left = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    path = os.pathsep.join([str(environment / "bin"), os.environ["PATH"]])
    return subprocess.run(
        [str(environment / "bin" / words[0]), *words[1:]],
        cwd=folder,
        env={**left, "PATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def test_the_wheel_holds_sources_tools_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "megatron_sffn").rglob("*")
        if path.suffix in (".py", ".cpp")
    }
    expected |= {f"megatron_sffn/tools/{path.name}" for path in (ROOT / "tools").glob("*.py")}
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert any(name.endswith(".cpp") for name in names)


def test_apex_is_in_no_extra_and_kept_out() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    named = [*project["dependencies"], *(one for extra in extras.values() for one in extra)]
    assert "apex" not in {Requirement(one).name for one in named}
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
    done = subprocess.run([*command, *constraints], capture_output=True, text=True)
    assert done.returncode != 0
    assert "(constraint) apex<0" in done.stdout


@pytest.mark.parametrize("words", [["megatron-sffn"], ["python", "-m", "megatron_sffn"]])
def test_the_console_script_lists_every_tool(
    environment: Path, tmp_path: Path, words: list[str]
) -> None:
    done = outside(environment, tmp_path, *words)
    assert done.returncode == 0, done.stderr
    assert all(f"\n  {name} " in done.stdout for name in ["doctor", "pretrain", *TOOLS])


@pytest.mark.parametrize("tool", ["doctor", *TOOLS])
def test_every_tool_starts_outside_the_clone(environment: Path, tmp_path: Path, tool: str) -> None:
    done = outside(environment, tmp_path, "megatron-sffn", tool, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")


@pytest.mark.parametrize("words", [["nonsense"], ["accounting", "--nonsense"]])
def test_bad_input_is_one_sentence(environment: Path, tmp_path: Path, words: list[str]) -> None:
    done = outside(environment, tmp_path, "megatron-sffn", *words)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_the_installed_package_trains(environment: Path, tmp_path: Path) -> None:
    where = outside(environment, tmp_path, "python", "-c", "import megatron_sffn as m; print(m)")
    assert str(environment) in where.stdout, where
    done = outside(
        environment,
        tmp_path,
        *("python", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "megatron_sffn.pretrain", *RUN.split()),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "saved" / "summary.json").read_text())["iterations"] == 5
    # A tool reads what the run left.
    converted = outside(
        environment,
        tmp_path,
        *("megatron-sffn", "convert-checkpoint", "reblock", "--load", "saved"),
        *("--save", "finer", "--block-size", "4", "--no-evaluate"),
    )
    assert converted.returncode == 0, converted.stderr
    assert (tmp_path / "finer" / "iter_0000005" / ".metadata").is_file()
