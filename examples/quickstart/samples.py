"""Generates text with the trained models of the quick start, and says how to go on with them.

Inputs: the folders of finished runs. Outputs: `samples.jsonl` in each of them, a continuation of
each prompt; ten lines for the terminal; commands that a user can copy.

Design notes: a prompt is the beginning of a line, and one line is shown of each text, so that ten
prompts give ten lines whatever a model writes. No prompt ends with a space, because the tokens of
the tokenizer begin with theirs.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from examples.quickstart.data import run_tool
from examples.quickstart.runs import Plan, Run, environment, program
from megatron_sffn.utils.atomic_files import read_records

TEMPERATURE = 0.7
NEW_TOKENS = 24
LINE_WIDTH = 96
"""Most characters of a shown line."""

PROMPTS = {
    "stdlib": (
        "import",
        "class Test",
        "def __init__(self,",
        '"""Return the',
        "if not isinstance(",
        "for key, value in",
        "with self.assertRaises(",
        "return self.",
        "raise ValueError(",
        "# This is",
    ),
    "debian-docs": (
        "The following",
        "You can use",
        "If the file",
        "This option",
        "In order to",
        "To install the",
        "By default,",
        "For example,",
        "Note that",
        "When the system",
    ),
}
"""Value of `--corpus` -> ten beginnings of lines."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A prompt and its continuation.

    Args:
        prompt: the beginning of the line.
        text: what the model wrote after it, to the end of the line.
    """

    prompt: str
    text: str

    @property
    def shown(self) -> str:
        """The text, cut where the line becomes too long."""
        return self.text[: LINE_WIDTH - len(self.prompt)]


def read_samples(plan: Plan, run: Run, prompts: Sequence[str]) -> list[Sample] | None:
    """The samples of a run; None if it has none of these prompts yet."""
    records = list(read_records(plan.folder_of(run) / "samples.jsonl"))
    if [record.get("prompt") for record in records] != list(prompts):
        return None
    return [
        Sample(prompt=record["prompt"], text=record["text"].partition("\n")[0].rstrip())
        for record in records
    ]


def generate_samples(plan: Plan, run: Run, prompts: Sequence[str]) -> None:
    """Continue the prompts with the model of a finished run, and write `samples.jsonl`."""
    folder = plan.folder_of(run)
    run_tool(
        "generate",
        *("--load", str(folder), "--output", str(folder / "samples.jsonl")),
        *(f"--prompt={prompt}" for prompt in prompts),
        *("--batch-size", str(len(prompts)), "--max-new-tokens", str(NEW_TOKENS)),
        *("--temperature", str(TEMPERATURE), "--seed", str(plan.seed)),
        environment=environment(),
    )


def terminal_lines(plan: Plan, run: Run, samples: Sequence[Sample]) -> str:
    """The generated lines of a run, with a heading."""
    title = f"{run.title} continues (temperature {TEMPERATURE}, seed {plan.seed}; prompt | text):"
    return "\n".join([title, *(f"  {sample.prompt} |{sample.shown}" for sample in samples)])


def next_commands(plan: Plan, run: Run, prompt: str) -> str:
    """The commands that generate with, evaluate and export the model of a run."""
    folder = shlex.quote(str(plan.folder_of(run)))
    held_out = shlex.quote(str(plan.folder / "data" / "valid.jsonl"))
    export = shlex.quote(str(plan.folder / f"{run.name}-hf"))
    tool = program("megatron-sffn")
    return "\n".join(
        [
            f"{tool} generate --load {folder} --prompt {shlex.quote(prompt)} "
            f"--temperature {TEMPERATURE}",
            f"{tool} eval --load {folder} --data {held_out}",
            f"{tool} export --load {folder} --output {export}",
        ]
    )
