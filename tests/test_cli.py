"""`megatron-sffn`: the list of commands, the version, a mistyped name."""

from __future__ import annotations

import subprocess
import sys
import tomllib

import pytest

from megatron_sffn import cli
from megatron_sffn.utils.errors import ConfigError
from tests.support.paths import ROOT


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_alone_it_lists_the_commands_with_a_line_each(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "megatron_sffn", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.splitlines()
    for name, path in cli.commands().items():
        [line] = [line for line in lines if line.split()[:1] == [name]]
        assert line.endswith(cli.summary(path))
        assert len(cli.summary(path)) > 10
    assert "--version" in done.stdout


def test_the_version_is_that_of_the_project(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert capsys.readouterr().out == f"megatron-sffn {project['version']}\n"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("pretrian", "did you mean pretrain? "),
        ("preprocess_data", "did you mean preprocess-data? "),
        ("zzz", ""),
    ],
)
def test_a_mistyped_command_is_one_sentence_with_the_nearest_one(typed: str, meant: str) -> None:
    with pytest.raises(ConfigError) as refused:
        cli.main([typed, "--save", "x"])
    assert str(refused.value) == (
        f"{typed!r} is no command of megatron-sffn; {meant}megatron-sffn --help lists all commands"
    )


def test_it_answers_without_importing_what_is_slow() -> None:
    code = (
        "import sys; from megatron_sffn import cli; cli.main(['--version']); "
        "print(*sorted({name.partition('.')[0] for name in sys.modules} & {'torch', 'numpy', "
        "'megatron', 'multiprocessing'}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[1:] == [""]
