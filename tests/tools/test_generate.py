"""The command: prompts from everywhere, text and JSON, one sentence for what cannot work."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.jobs import Output, run_as_job

PP2 = "--pipeline-model-parallel-size 2"
GREEDY = ["--temperature", "0", "--max-new-tokens", "6"]
Generate = Callable[..., list[Output]]


@pytest.fixture
def run(trained, tmp_path: Path) -> Generate:
    """`run(*flags)` is the output of the command on every rank, for a trained model."""

    def call(*flags: str, ranks: int = 1, stdin: str = "", load: Path | None = None) -> Any:
        folder = str(load or trained("avg-k"))

        def body() -> None:
            from tools import generate

            generate.main(["--load", folder, *flags])

        return run_as_job(ranks, body, folder=tmp_path, stdin=stdin)

    return call


def refusal(run: Generate, *flags: str, **options: Any) -> str:
    """The sentence of the command, which must not have started Megatron."""
    with pytest.raises(AssertionError) as error:
        run(*flags, **options)
    text = str(error.value)
    assert "ConfigError: " in text, text
    assert "initializ" not in text
    return text.rsplit("RuntimeError: ConfigError: ", 1)[1].splitlines()[0]


def test_prompts_of_every_form_have_the_same_text(run: Generate, tmp_path: Path) -> None:
    prompts = ["def f(", "class Name", "x"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n\n")
    lines = [json.dumps({"prompt": prompt, "number": 1}) for prompt in prompts]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    flags = [word for prompt in prompts for word in ("--prompt", prompt)]
    (given,) = run(*flags, *GREEDY, "--json")
    records = [json.loads(line) for line in given.stdout.splitlines()]
    assert [record["prompt"] for record in records] == prompts
    for record in records:
        assert record.keys() == {"prompt", "text", "tokens", "num_prompt_tokens", "finish_reason"}
        assert record["num_prompt_tokens"] == len(record["prompt"])
        assert (len(record["tokens"]), record["finish_reason"]) == (6, "length")
    for name in ("prompts.txt", "prompts.jsonl"):
        (of_file,) = run("--prompt-file", name, *GREEDY, "--json", "--batch-size", "2")
        assert of_file.stdout == given.stdout
    first, second = run(
        "--prompt-file", "prompts.txt", *GREEDY, "--output", "made/out.jsonl", *PP2.split(), ranks=2
    )
    assert first.stdout == second.stdout == ""
    assert "3 continuations -> made/out.jsonl" in first.stderr
    assert (tmp_path / "made" / "out.jsonl").read_text() == given.stdout
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["out.jsonl"]


def test_text_is_streamed_and_interactive_prompts_are_answered(run: Generate) -> None:
    (plain,) = run("--prompt", "def f(", *GREEDY)
    assert plain.stdout.startswith("def f(")
    assert plain.stdout.endswith("\n")
    typed = f"def f(\n{'x' * 60}\ndef f("
    first, second = run("--interactive", *GREEDY, *PP2.split(), ranks=2, stdin=typed)
    assert first.stdout == plain.stdout * 2
    assert second.stdout == ""
    assert "error: the prompt has 60 tokens, and with 6 new ones they are more" in first.stderr


def test_without_a_limit_the_context_is_filled(run: Generate) -> None:
    (made,) = run("--prompt", "x" * 50, "--temperature", "0", "--ignore-eod", "--json")
    assert len(json.loads(made.stdout)["tokens"]) == 64 - 50


def test_ids_are_the_prompts_of_a_run_without_text(pretrain, run: Generate, tmp_path: Path) -> None:
    pretrain(1, "--sffn-router dense --train-iters 1 --save run --save-interval 1 --split 90,10,0")
    load = tmp_path / "run"
    (made,) = run("--prompt", "1 2 3", *GREEDY, "--json", load=load)
    record = json.loads(made.stdout)
    assert record["num_prompt_tokens"] == 3
    assert record["text"].split() == [str(token) for token in record["tokens"]]
    assert refusal(run, "--prompt", "1 two", load=load) == (
        "--prompt '1 two' is no list of ids, which is what the tokenizer of this run reads; give "
        "numbers with spaces between them"
    )
    assert "has the id 999, but the ids are 0 to 255; leave it out" in refusal(
        run, "--prompt", "1 999", load=load
    )


def test_a_moved_tokenizer_is_named(
    run: Generate, trained, bytes_tokenizer: str, tmp_path: Path
) -> None:
    shutil.copytree(bytes_tokenizer, tmp_path / "moved")
    (moved,) = run("--prompt", "x", *GREEDY, "--tokenizer-model", str(tmp_path / "moved"))
    (at_home,) = run("--prompt", "x", *GREEDY)
    assert moved.stdout == at_home.stdout
    sentence = refusal(run, "--prompt", "x", "--tokenizer-model", f"{tmp_path}/nothing")
    assert sentence.startswith(f"--tokenizer-model {tmp_path}/nothing does not exist; ")


def test_what_cannot_work_is_one_sentence(run: Generate, tmp_path: Path) -> None:
    (tmp_path / "lines.jsonl").write_text('{"prompt": "x"}\n{"text": "x"}\n')
    (tmp_path / "empty.txt").write_text("\n")
    prompt = ("--prompt", "x" * 60)
    for flags, sentence in (
        (
            (*prompt, "--max-new-tokens", "5"),
            "--prompt has 60 tokens, and with 5 new ones they "
            "are more than the context of the model, 64 tokens; give --max-new-tokens 4",
        ),
        (
            ("--prompt", "x" * 90),
            "--prompt has 90 tokens, and with 1 new ones they are more than "
            "the context of the model, 64 tokens; cut it to 63 tokens",
        ),
        ((*prompt, "--temperature", "-1"), "--temperature -1.0 is not a finite number"),
        ((*prompt, "--ckpt-step", "7"), "--ckpt-step 7 is not there (iterations in"),
        ((*prompt, "--tensor-model-parallel-size", "3"), "--tensor-model-parallel-size 3 times"),
        ((*prompt, "--expert-model-parallel-size", "0"), "--expert-model-parallel-size 0 must be"),
        (("--prompt-file", "none"), "--prompt-file none cannot be read"),
        (("--prompt-file", "empty.txt"), "--prompt-file empty.txt has no prompts"),
        (("--prompt-file", "lines.jsonl"), "--prompt-file lines.jsonl line 2 has no string under"),
        (("--interactive", "--json"), "--interactive prints text"),
    ):
        assert refusal(run, *flags).startswith(sentence)
    assert refusal(run, *prompt, load=tmp_path / "nothing").startswith(
        f"--load {tmp_path}/nothing does not exist; give the folder"
    )
