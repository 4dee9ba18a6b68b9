"""Pages show command lines that work and flags that exist, and leave out no flag."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from tests.support.command_lines import (
    CommandLine,
    command_lines,
    modules_with_flags,
    option_strings,
    problem_of,
    run_until_parsed,
)
from tests.test_docs import CURRENT_PAGES, page_id

FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*(?![\w-])")
OTHER_PROGRAMS = {
    "docker": "--build-arg --gpus --ipc --isolation --ulimit --user",
    "git": "--tags",
    "lm_eval": "--batch_size --include_path --model_args",
    "Megatron-LM's tools": "--find-optimal-num-workers",
    "pip": "--dest --no-build-isolation --no-deps --no-index --only-binary --platform "
    "--python-version --target --wheel-dir",
    "ray": "--address --head",
    "Slurm": "--container-image --dependency --nodes --ntasks-per-node --signal --time",
    "tests": "--only --update-golden",
    "vllm": "--port --served-model-name",
    "zstd": "--long",
}
"""Program -> its flags that pages show, beside those of torchrun and ours."""

pytestmark = pytest.mark.filterwarnings(
    "ignore:'type' is deprecated:DeprecationWarning"  # Megatron's own, under Python 3.13
)


@pytest.fixture(scope="module")
def flags() -> dict[str, list[tuple[str, ...]]]:
    """Module of a command -> the spellings of each of its flags."""
    return {
        module: list(option_strings(run_until_parsed(module, [], elided=True).parser))
        for module in modules_with_flags()
    }


@pytest.mark.parametrize("page", CURRENT_PAGES, ids=page_id)
def test_the_parsers_accept_every_command_line_of_a_page(page: Path) -> None:
    problems = {str(line): problem_of(line) for line in command_lines(page.read_text())}
    assert not {line: problem for line, problem in problems.items() if problem}


def test_every_flag_that_a_page_names_exists(flags: dict[str, list[tuple[str, ...]]]) -> None:
    known = {name for spellings in flags.values() for names in spellings for name in names}
    known |= {"--help", "--version", *" ".join(OTHER_PROGRAMS.values()).split()}
    known |= {name for names in option_strings(get_args_parser()) for name in names}
    for page in CURRENT_PAGES:
        named = {flag for flag in FLAG.findall(page.read_text()) if not flag.endswith("-")}
        assert not named - known - {"--sffn"}, page_id(page)  # "the --sffn flags"


def test_every_flag_is_on_some_page(flags: dict[str, list[tuple[str, ...]]]) -> None:
    pages = [page.read_text() for page in CURRENT_PAGES if page.name != "megatron-flags.md"]
    named = {flag for page in pages for flag in FLAG.findall(page)}
    for module, spellings in flags.items():
        for names in spellings:
            is_megatrons = module == "megatron_sffn.pretrain" and "--sffn-" not in names[0]
            if module.startswith("megatron_sffn.") and not is_megatrons:
                assert named & set(names), f"{module}: {' '.join(names)} is on no page"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (
            "torchrun -m megatron_sffn.pretrain ... --sffn-routre avg-k",
            "does not know --sffn-routre",
        ),
        (".venv/bin/torchrun --nproc 2 -m megatron_sffn.pretrain --lr 1e-3", "ambiguous"),
        ("python -m megatron_sffn.pretrain --sffn-backend cude", "invalid choice: 'cude'"),
        ("examples/launch/static.sh --num-layer 12 ...", "does not know --num-layer"),
        ("megatron-sffn accounting ... --sffn-expansions 4", "does not know --sffn-exp"),
        ("$ megatron-sffn evaluate --load runs/mine", "no command evaluate"),
        (".venv/bin/megatron-sffn export --load runs/mine", "required: --output"),
        ("python tools/convert_checkpoint.py reblock ... --block_size 4", "--block_size"),
        ("python -m benchmarks.nothing", "there is no benchmarks.nothing"),
        ("make tests", "no target tests"),
        ("make bench ARGS='--block-size 4'", "--block-size"),
    ],
)
def test_a_command_line_that_would_be_refused_is_found(line: str, problem: str) -> None:
    (command,) = command_lines(f"Text.\n\n```\n{line}\n```\n")
    assert isinstance(command, CommandLine)
    assert problem in (problem_of(command) or "")
