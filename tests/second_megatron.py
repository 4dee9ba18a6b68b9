"""Run the tests with another Megatron: `python -m tests.second_megatron FOLDER [flags of pytest]`.

Inputs: a folder with `megatron/core` and `megatron/training`, which is a source tree of Megatron or
the folder of `pip install --target`. Outputs: a line with the version that is tested, and the
report of `python -m tests`; exit code 1 if any test failed.

Design notes:
- The tests run in an environment of their own, which links to every package of this one except
  megatron-core. No process that a test starts can import the installed Megatron, not even one
  without environment variables, as it could if the folder were only named in PYTHONPATH.
- The folder is copied, and the index helper, which a source tree lacks, is compiled in the copy.
"""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path

from megatron_sffn.utils.errors import ConfigError, run_command
from tests.support.paths import ROOT

VARIABLE = "SECOND_MEGATRON"
"""Environment variable with the folder from which the tests have to import Megatron."""


def main(argv: Sequence[str] | None = None) -> int:
    """Make the environment, and run the tests in it."""
    folder, *flags = (sys.argv[1:] if argv is None else argv) or [""]
    version = version_of(Path(folder))
    with tempfile.TemporaryDirectory() as scratch:
        packages = make_environment(Path(scratch), Path(folder), version)
        print(f"testing megatron-core {version} of {folder}", flush=True)
        command = [str(Path(scratch) / "bin" / "python"), "-m", "tests", *flags]
        environment = {**os.environ, VARIABLE: str(packages)}
        return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def version_of(folder: Path) -> str:
    """The version of megatron-core in a folder.

    Raises:
        ConfigError: if the folder does not hold Megatron and its training loop.
    """
    for part in ("core/package_info.py", "training"):
        if not (folder / "megatron" / part).exists():
            raise ConfigError(
                f"{str(folder)!r} is no Megatron, because it has no megatron/{part}; give a source "
                "tree of Megatron or the folder of pip install --target: make test-megatron "
                "MEGATRON=FOLDER"
            )
    return str(runpy.run_path(str(folder / "megatron/core/package_info.py"))["__version__"])


def make_environment(environment: Path, folder: Path, version: str) -> Path:
    """Make a virtual environment with the packages of this one, and another Megatron.

    Returns:
        Its site-packages.
    """
    venv.create(environment)
    (packages,) = environment.glob("lib/python*/site-packages")
    for package in Path(sysconfig.get_path("purelib")).iterdir():
        if package.name != "megatron" and not package.name.startswith("megatron_core-"):
            (packages / package.name).symlink_to(package.resolve())
    _copy_scripts(Path(sysconfig.get_path("scripts")).resolve(), environment / "bin")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(folder / "megatron", packages / "megatron", ignore=ignored)
    _compile_helper(packages / "megatron" / "core" / "datasets")
    # As pip does: pytest would make the warnings of a compilation errors.
    compile_all = [environment / "bin" / "python", "-W", "ignore", "-m", "compileall", "-q"]
    subprocess.run([*compile_all, packages / "megatron"], check=False)
    metadata = packages / f"megatron_core-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: megatron-core\nVersion: {version}\n"
    )
    return packages


def _copy_scripts(source: Path, target: Path) -> None:
    """Copy commands such as torchrun; each names its interpreter in its first lines."""
    for script in source.iterdir():
        copy = target / script.name
        if copy.exists() or not script.is_file():
            continue
        try:
            text = script.read_text()
        except UnicodeDecodeError:
            copy.symlink_to(script)
        else:
            copy.write_text(text.replace(f"{source}/", f"{target}/"))
            shutil.copymode(script, copy)


def _compile_helper(datasets: Path) -> None:
    """Compile the index helper, with the headers of torch, unless a wheel has brought it."""
    import torch

    helper = datasets / f"helpers_cpp{sysconfig.get_config_var('EXT_SUFFIX')}"
    if helper.exists() or not (datasets / "helpers.cpp").exists():
        return
    headers = [f"{Path(torch.__file__).parent}/include", sysconfig.get_path("include")]
    command = [os.environ.get("CXX", "c++"), "-O3", "-shared", "-std=c++17", "-fPIC"]
    command += [*(f"-I{path}" for path in headers), "helpers.cpp", "-o", str(helper)]
    subprocess.run(command, cwd=datasets, check=True)


def wrong_import() -> str | None:
    """Why this process does not test what `main` was asked to test; None if it does."""
    import megatron.core

    expected, imported = os.environ.get(VARIABLE), Path(megatron.core.__file__).parents[2]
    if expected is None or Path(expected).samefile(imported):
        return None
    return f"Megatron was imported from {imported}, but {expected} is to be tested"


if __name__ == "__main__":
    run_command(main)
