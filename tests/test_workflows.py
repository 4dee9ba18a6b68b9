"""Workflows, versions and the development container: they name what exists, and agree.

`make check` compares the files with their schemas.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.paths import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()


def load(workflow: Path) -> dict[str, Any]:
    return dict(yaml.safe_load(workflow.read_text()))


def steps(workflow: Path) -> Iterator[dict[str, Any]]:
    for job in load(workflow)["jobs"].values():
        yield from job["steps"]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_runs_scripts_and_targets_that_exist(workflow: Path) -> None:
    lines = [line for step in steps(workflow) for line in step.get("run", "").splitlines()]
    for line in lines:
        for target in re.findall(r"\bmake ([a-z-]+)", line):
            assert target in TARGETS, line
        for script in re.findall(r"(?:^| )((?:\.ci|docker|tools|examples)/[\w./-]+)", line):
            assert os.access(ROOT / script, os.X_OK), line
        assert "${{" not in line, "text from outside becomes code there: pass it as a variable"


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_may_write_only_where_a_job_asks_for_it(workflow: Path) -> None:
    assert load(workflow)["permissions"] == {"contents": "read"}
    for step in steps(workflow):
        assert re.search(r"@(v\d|release/v\d)", step.get("uses", "@v1")), "a released action"


def test_ci_runs_the_script_with_every_supported_python() -> None:
    job = load(ROOT / ".github/workflows/ci.yml")["jobs"]["test"]
    assert ".ci/run" in [step.get("run") for step in job["steps"]]
    trailing = "Programming Language :: Python :: "
    supported = [name.removeprefix(trailing) for name in PROJECT["classifiers"] if trailing in name]
    assert job["strategy"]["matrix"]["python"] == supported


@pytest.mark.parametrize(
    ("tag", "error"),
    [
        (f"v{PROJECT['version']}", None),
        ("v99.0.0", f"tag v99.0.0, but pyproject.toml has {PROJECT['version']}"),
    ],
)
def test_a_release_has_the_version_of_its_tag_and_the_notes_of_the_changelog(
    tmp_path: Path, tag: str, error: str | None
) -> None:
    for name in ("CHANGELOG.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (step,) = (
        step for step in steps(ROOT / ".github/workflows/release.yml") if step.get("id") == "notes"
    )
    process = subprocess.run(
        ["bash", "-eo", "pipefail", "-c", step["run"]],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "GITHUB_REF_NAME": tag},
        capture_output=True,
        text=True,
    )
    if error:
        assert (process.returncode, process.stdout) == (1, f"::error::{error}\n")
        return
    assert process.returncode == 0, process.stdout + process.stderr
    notes = (tmp_path / "notes.md").read_text()
    assert notes.strip().startswith("### ") and "\n## " not in notes
    assert notes in CHANGELOG


def test_version_and_date_are_those_of_the_newest_section_of_the_changelog() -> None:
    unreleased, newest, *_ = re.findall(r"^## \[(.*?)\](?: - (.*))?$", CHANGELOG, re.MULTILINE)
    assert unreleased == ("Unreleased", "")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert newest == (PROJECT["version"], str(citation["date-released"]))
    assert citation["version"] == PROJECT["version"]
    assert f"megatron_sffn-{PROJECT['version']}-py3" in (ROOT / "docs/install.md").read_text()


def test_the_development_container_is_made_by_a_target_that_exists() -> None:
    text = (ROOT / ".devcontainer" / "devcontainer.json").read_text()
    container = json.loads(re.sub(r"^\s*//.*$", "", text, flags=re.MULTILINE))
    assert container["postCreateCommand"].removeprefix("make ") in TARGETS
