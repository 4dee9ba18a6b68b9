"""docker/: checks of the images that need no build."""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.paths import ROOT

FILES = ["docker/Dockerfile", "docker/Dockerfile.cpu"]
BUILD = ROOT / "docker" / "build.sh"


def stages_of(file: str) -> dict[str, list[tuple[str, str]]]:
    """Stage -> its instructions with arguments, after those of its base stage."""
    text = "\n".join(
        line for line in (ROOT / file).read_text().splitlines() if not line.startswith("#")
    )
    result: dict[str, list[tuple[str, str]]] = {}
    stage: list[tuple[str, str]] = []
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        instruction, _, arguments = line.partition(" ")
        if instruction == "FROM":
            base, _, name = arguments.partition(" AS ")
            stage = result[name] = list(result.get(base, []))
        elif instruction:
            stage.append((instruction, arguments))
    return result


@pytest.mark.parametrize("file", FILES)
def test_the_image_has_a_user_a_health_check_and_labels(file: str) -> None:
    *_, (name, image) = stages_of(file).items()
    assert name == "image", "`docker build` without --target makes the last stage"
    last = dict(image)
    assert last["USER"].isdecimal(), "Kubernetes checks runAsNonRoot by number"
    assert int(last["USER"]) > 0
    assert '"megatron_sffn.doctor", "--no-smoke"' in last["HEALTHCHECK"]
    labels = " ".join(arguments for instruction, arguments in image if instruction == "LABEL")
    for label in ("title", "description", "licenses", "version", "revision"):
        assert f"org.opencontainers.image.{label}=" in labels


@pytest.mark.parametrize(
    ("file", "stage"), [("docker/Dockerfile", "runtime"), ("docker/Dockerfile.cpu", "requirements")]
)
def test_requirements_are_installed_in_a_layer_below_the_source(file: str, stage: str) -> None:
    kinds = [
        "requirements" if "--requirement requirements.txt" in arguments else "source"
        for instruction, arguments in stages_of(file)[stage]
        if "--requirement requirements.txt" in arguments
        or (instruction == "COPY" and re.search(r"megatron_sffn|examples|tools", arguments))
    ]
    assert kinds[0] == "requirements"
    assert kinds.count("requirements") == 1


@pytest.mark.parametrize("file", FILES)
def test_pip_installs_only_pinned_packages(file: str) -> None:
    installs = [
        arguments
        for stage in stages_of(file).values()
        for instruction, arguments in stage
        if instruction == "RUN" and re.search(r"\bpip (install|wheel)\b", arguments)
    ]
    assert installs
    for arguments in installs:
        assert re.search("--no-deps|--constraint |PIP_CONSTRAINT=pins.txt", arguments)


@pytest.mark.parametrize("file", FILES)
def test_the_build_context_holds_only_files_that_are_copied(file: str) -> None:
    _, first_pattern, *lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert first_pattern == "*"
    names = {line[1:] for line in lines if line.startswith("!")}
    copied = {
        source
        for stage in stages_of(file).values()
        for instruction, arguments in stage
        if instruction == "COPY" and not arguments.startswith("--from")
        for source in arguments.split()[:-1]
    }
    assert copied <= names
    assert all((ROOT / name).exists() for name in names)
    size = sum(
        path.stat().st_size
        for name in names
        for path in [ROOT / name, *(ROOT / name).rglob("*")]
        if path.is_file() and not fnmatch.fnmatch(str(path), "*/__pycache__/*")
    )
    assert size < 5e6, f"{size} bytes go to the builder"


def build(path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Call docker/build.sh with a PATH that has only a folder and the commands it needs."""
    for name in ("bash", "dirname", "git", "sed"):
        if not (path / name).exists() and (command := shutil.which(name)):
            (path / name).symlink_to(command)
    environment = {
        "PATH": str(path),
        "TESTS": "tests/nn/routers tests/ops",
        "QUICKSTART": "--train-iters 20",
    }
    return subprocess.run(
        [BUILD, *arguments], env=environment, capture_output=True, text=True, check=False
    )


def write_engine(path: Path, name: str, *, works: bool = True) -> None:
    """Write a fake container engine that prints its arguments; `works`: its daemon runs."""
    (path / name).write_text(
        f"#!{shutil.which('bash')}\ncase $1 in info) {'true' if works else 'false'} ;; "
        f'*) echo "{name} $*" ;; esac\n'
    )
    (path / name).chmod(0o755)


@pytest.mark.parametrize("arguments", [[], ["tpu"]])
def test_an_unknown_kind_of_image_is_refused(tmp_path: Path, arguments: list[str]) -> None:
    result = build(tmp_path, *arguments)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert f"'{''.join(arguments)}' is neither cpu nor gpu; give one of them." in line


def test_without_an_engine_the_script_says_what_to_install(tmp_path: Path) -> None:
    write_engine(tmp_path, "docker", works=False)
    result = build(tmp_path, "cpu")
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "no docker with a running daemon, podman or buildah found" in line
    assert "apt-get install podman" in line


def test_podman_is_used_when_docker_has_no_daemon(tmp_path: Path) -> None:
    write_engine(tmp_path, "docker", works=False)
    write_engine(tmp_path, "podman")
    result = build(tmp_path, "cpu", "--isolation", "chroot")
    assert (result.returncode, result.stderr) == (0, "")
    calls = [line for line in result.stdout.splitlines() if line.startswith("podman ")]
    assert [line.split()[1] for line in calls] == ["build", "build", "run", "run", "run"]
    # Podman's own format drops the health check.
    assert all("--format docker" in line and "--isolation chroot" in line for line in calls[:2])
    expected = [
        "doctor --no-smoke",
        "quickstart --train-iters 20",
        "/tests/nn/routers /opt/megatron-sffn/tests/ops",
    ]
    for line, end in zip(calls[2:], expected, strict=True):
        assert "--network none" in line
        assert line.endswith(end)


def test_the_gpu_image_is_built_and_not_run(tmp_path: Path) -> None:
    write_engine(tmp_path, "docker")
    result = build(tmp_path, "gpu", "--build-arg", "BASE=other")
    assert (result.returncode, result.stderr) == (0, "")
    (call,) = (line for line in result.stdout.splitlines() if line.startswith("docker build"))
    assert "--file docker/Dockerfile " in call
    assert "--build-arg BASE=other" in call
    assert "--format" not in call


def test_the_script_is_executable() -> None:
    assert os.access(BUILD, os.X_OK)
