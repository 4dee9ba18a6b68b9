"""`megatron-sffn` lists its commands, prints its version and refuses mistyped names."""

from __future__ import annotations

import subprocess
import sys
import tomllib

import pytest

from megatron_sffn import cli
from megatron_sffn.utils.errors import ConfigError
from tests.support.paths import ROOT


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_without_arguments_all_commands_are_listed_with_a_summary(arguments: list[str]) -> None:
    process = subprocess.run(
        [sys.executable, "-m", "megatron_sffn", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = process.stdout.splitlines()
    assert [line[:-1] for line in lines if line[:-1] in cli.GROUPS] == list(cli.GROUPS)
    for name, path in cli.commands().items():
        [line] = [line for line in lines if line.split()[:1] == [name]]
        assert line.endswith(cli.summary(path))
        assert len(cli.summary(path)) > 10
    assert "--version" in process.stdout


def test_every_command_is_in_one_group_of_the_list() -> None:
    tools = {path.stem for path in (ROOT / "tools").glob("*.py")}
    listed = [name for names in cli.GROUPS.values() for name in names]
    assert sorted(listed) == sorted(
        {"doctor", "pretrain"} | {cli.RENAMED.get(t, t).replace("_", "-") for t in tools}
    )


def test_version_prints_the_version_of_the_project(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert capsys.readouterr().out == f"megatron-sffn {project['version']}\n"


@pytest.mark.parametrize(
    ("mistyped", "hint"),
    [
        ("pretrian", "did you mean pretrain? "),
        ("preprocess_data", "did you mean preprocess-data? "),
        ("zzz", ""),
    ],
)
def test_a_mistyped_command_is_refused_with_a_suggestion(mistyped: str, hint: str) -> None:
    with pytest.raises(ConfigError) as error:
        cli.main([mistyped, "--save", "x"])
    assert str(error.value) == (
        f"{mistyped!r} is no command of megatron-sffn; {hint}"
        "megatron-sffn --help lists all commands"
    )


def test_the_command_starts_without_slow_imports() -> None:
    code = (
        "import sys; from megatron_sffn import cli; cli.main(['--version']); "
        "print(*sorted({name.partition('.')[0] for name in sys.modules} & {'torch', 'numpy', "
        "'megatron', 'multiprocessing'}))"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert process.stdout.splitlines()[1:] == [""]
