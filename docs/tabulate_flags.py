"""Write the tables of `docs/megatron-flags.md`: `python -m docs.tabulate_flags`.

Inputs: `tests/golden/flags.json`, in which the sweep of flags keeps what a run with each flag did,
and Megatron's parser, whose groups are the tables. Outputs: the page, with the tables between its
markers renewed.

Design notes: a refusal counts as `depends` if another value, another flag, an installed package or
more ranks would lift it. Its sentence says so; those of the other refusals are in `FOR_GOOD`.
"""

from __future__ import annotations

import argparse
import json
import re
import warnings
from argparse import Action
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron.training.arguments import add_megatron_arguments

from docs.marked_text import replace_marked
from megatron_sffn.flags.megatron_flags import DENSE_ONLY, DERIVED, is_moe_flag
from tests.flag_sweep import GOLDEN, flag_of

PAGE = Path(__file__).parent / "megatron-flags.md"

MOE = "mixture of experts"
GROUPS = (
    "transformer configuration",
    "network size",
    "mla",
    "experimental_attention_variant",
    "experimental",
    "mixed precision",
    "Transformer-Engine",
    "distributed init",
)
"""Megatron's groups of flags that define a model, its precision or its parallelism."""

FOR_GOOD = re.compile(
    r"is not available|follows from the --sffn flags|has no effect on|is no longer valid"
    r"|Megatron has renamed it"
)
"""What a refusal says that holds in every run with sparse layers."""

KINDS = ("works", "no effect", "depends", "refused")


def kind_of(entry: dict[str, Any]) -> str:
    """One of `KINDS`, for an entry of the sweep."""
    if entry["class"] == "refused" and not FOR_GOOD.search(entry["sentence"]):
        return "depends"
    return str(entry["class"])


def reason_of(entry: dict[str, Any]) -> str:
    """The reason of a flag that does not work, without the words that the row has anyway."""
    sentence = entry.get("sentence", entry.get("reason", ""))
    sentence = sentence.removesuffix("; leave it out").removesuffix("; change them")
    sentence = sentence.removesuffix("; --help lists our flags, --help-all all")
    flag, *value = entry["tried"].split(" --")[0].split(" ", 1)
    sentence = sentence.removeprefix(f"{flag} {' '.join(value)} ").removeprefix(f"{flag} ")
    sentence = re.sub(r"([|*_<>\[\]])", r"\\\1", sentence)
    return re.sub(r"(?<![\w-])--[\w\\-]+", lambda flag: f"`{flag[0].replace('\\', '')}`", sentence)


def table(flags: Iterable[str], results: dict[str, dict[str, Any]]) -> str:
    """A count of each kind, and a row for each flag."""
    entries = [results[flag] for flag in sorted(flags)]
    counts = Counter(map(kind_of, entries))
    lines = [
        f"{len(entries)} flags: {', '.join(f'{counts[k]} `{k}`' for k in KINDS if counts[k])}.",
        "",
        "| tried | result | why |",
        "|---|---|---|",
    ]
    lines += [f"| `{e['tried']}` | {kind_of(e)} | {reason_of(e)} |" for e in entries]
    return "\n".join(lines)


def groups() -> Iterator[tuple[str, list[Action]]]:
    """Title and flags of each of `GROUPS`, in its order."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    with warnings.catch_warnings():
        # Python 3.13 warns about Megatron's own flags.
        warnings.simplefilter("ignore", DeprecationWarning)
        add_megatron_arguments(parser)
    actions = {group.title: group._group_actions for group in parser._action_groups}
    yield MOE, [a for a in parser._actions if a.dest.startswith("moe_") or a.dest in DERIVED]
    yield "dense", [a for a in parser._actions if a.dest in DENSE_ONLY]
    for title in GROUPS:
        yield title, [a for a in actions[title] if not is_moe_flag(a.dest)]


def renewed(page: str) -> str:
    """The page with the text between `<!-- GROUP -->` and `<!-- end -->` replaced."""
    results = json.loads(GOLDEN.read_text())
    for title, actions in groups():
        page = replace_marked(page, title, table(map(flag_of, actions), results))
    return page


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text()))
