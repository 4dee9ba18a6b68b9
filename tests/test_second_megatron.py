"""`make test-megatron`: the tests and all that they start import the other Megatron, or fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sffn.utils.errors import ConfigError
from tests.second_megatron import VARIABLE, main, make_environment, version_of
from tests.support.paths import ROOT

IMPORTED = """
import importlib.metadata, json, os
import megatron.core, megatron.training
from megatron.core.package_info import __version__
namespace = [os.path.realpath(path) for path in megatron.__path__]
print(json.dumps([namespace, __version__, importlib.metadata.version("megatron-core")]))
"""


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A folder with a Megatron that has a version and nothing else."""
    for package in ("core", "training"):
        (tmp_path / "other" / "megatron" / package).mkdir(parents=True)
        (tmp_path / "other" / "megatron" / package / "__init__.py").touch()
    info = tmp_path / "other" / "megatron" / "core" / "package_info.py"
    info.write_text("__version__ = '0.77.1'\n")
    return tmp_path / "other"


@pytest.mark.parametrize("flags", [[], ["-I"]], ids=["", "isolated"])
def test_a_process_without_variables_imports_the_other_megatron_alone(
    other: Path, tmp_path: Path, flags: list[str]
) -> None:
    packages = make_environment(tmp_path / "environment", other, version_of(other))
    process = subprocess.run(
        [tmp_path / "environment" / "bin" / "python", *flags, "-c", IMPORTED],
        cwd=tmp_path,
        env={},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(process.stdout) == [[str(packages / "megatron")], "0.77.1", "0.77.1"]


def test_commands_run_in_the_environment_of_the_other_megatron(other: Path, tmp_path: Path) -> None:
    make_environment(tmp_path / "environment", other, version_of(other))
    torchrun = (tmp_path / "environment" / "bin" / "torchrun").read_text()
    assert f"{tmp_path}/environment/bin/python" in torchrun


def test_the_tests_end_at_once_if_another_megatron_was_imported(other: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/test_second_megatron.py"],
        cwd=ROOT,
        env={**os.environ, VARIABLE: str(other)},
        capture_output=True,
        text=True,
    )
    assert process.returncode != 0
    assert f"but {other} is to be tested" in process.stderr + process.stdout


def test_a_folder_without_a_training_loop_is_refused(other: Path) -> None:
    (other / "megatron" / "training" / "__init__.py").unlink()
    (other / "megatron" / "training").rmdir()
    with pytest.raises(ConfigError, match=r"is no Megatron, because it has no megatron/training; "):
        main([str(other)])
