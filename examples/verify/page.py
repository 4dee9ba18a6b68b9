"""Writes the tables of `docs/verified.md` from the cards of the configurations.

Inputs: the cards. Outputs: the page, with the tables between its markers renewed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from docs.marked_text import replace_marked
from examples.verify import cards
from examples.verify.cards import FAILED, NOT_RUN, PASSED
from examples.verify.configurations import ARGUMENTS, CONFIGURATIONS, ROOT, UNIFIED, Configuration
from megatron_sffn.utils.human_size import human_count

PAGE = ROOT / "docs" / "verified.md"

REDUCED = ("num-layers", "hidden-size", "ffn-hidden-size", "num-attention-heads", "seq-length")
"""Flags of sizes in the table of reductions."""
HEADINGS = (
    "| configuration | parameters | active | FLOPs | built | trained | memory | layouts | GPU |"
)


def value_of(flags: list[str], name: str) -> str:
    """The last value of a flag: a later one overrides the first."""
    values = [flags[i + 1] for i, flag in enumerate(flags) if flag == f"--{name}"]
    return values[-1] if values else ""


def reductions() -> str:
    """A row for each model: sizes of the full one and of the toy one."""
    lines = [
        "| script | " + " | ".join(f"`--{name}`" for name in REDUCED) + " |",
        "|---" * (len(REDUCED) + 1) + "|",
    ]
    names: dict[tuple[str, ...], dict[str, None]] = {}
    for configuration in CONFIGURATIONS:
        full, toy = configuration.flags(), configuration.flags(TOY="1")
        sizes = tuple(f"{value_of(full, name)} → {value_of(toy, name)}" for name in REDUCED)
        is_grid = configuration.script == UNIFIED
        kind = () if is_grid else configuration.arguments[:1]
        kind += ("dense",) if configuration.is_dense and not is_grid else ()
        names.setdefault(sizes, {})[f"`{' '.join([configuration.script, *kind])}`"] = None
    lines += [f"| {', '.join(same)} | {' | '.join(sizes)} |" for sizes, same in names.items()]
    return "\n".join(lines)


def field(card: Mapping[str, Any], name: str) -> str:
    """What a card says about a check."""
    check = card["checks"][name]
    if check["result"] == NOT_RUN:
        return "not run" if name == "gpu" else ""
    if check["result"] == FAILED:
        return "**failed**"
    assert check["result"] == PASSED, check
    match name:
        case "built":
            return ", ".join(f"{ranks:,}" for ranks in check["ranks"])
        case "trained":
            return f"{check['losses'][0]:.3f} → {check['losses'][-1]:.3f}"
        case "memory":
            return f"{sum(check['bytes'].values()) / 1e6:.2f} MB"
        case "layouts":
            return f"{max(check['largest_differences'].values()):.0e}"
    return PASSED


def row(configuration: Configuration, card: Mapping[str, Any]) -> str:
    """The row of a configuration."""
    counts = card["counts"]
    numbers = [
        human_count(counts[name]) if counts else ""
        for name in ("total", "active", "flops_training")
    ]
    name = " ".join(configuration.arguments) or configuration.script.removesuffix(".sh")
    path = cards.card_path(configuration).relative_to(ROOT)
    link = f"[{name}](../{path})" if card["counts"] else name
    fields = [field(card, check) for check in cards.CHECKS]
    return f"| {' | '.join([link, *numbers, *fields])} |"


def tables(all_cards: Mapping[str, Mapping[str, Any]]) -> str:
    """A table for each script, with a line that counts what was run."""
    sections = []
    for script in ARGUMENTS:
        chosen = [c for c in CONFIGURATIONS if c.script == script]
        counted = [
            f"{name} {sum(all_cards[c.name]['checks'][name]['result'] == PASSED for c in chosen)}"
            for name in cards.CHECKS
        ]
        rows = [row(c, all_cards[c.name]) for c in chosen]
        sections.append(
            f"## {script}\n\nPassed, of {len(chosen)}: {', '.join(counted)}.\n\n"
            + "\n".join([HEADINGS, "|---" * 9 + "|", *rows])
        )
    return "\n\n".join(sections)


def machines(all_cards: Iterable[Mapping[str, Any]]) -> str:
    """The machines and commits of all checks, with the number of checks and their days."""
    runs: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for card in all_cards:
        for check in card["checks"].values():
            if run := check.get("run"):
                key = (*run["machine"].values(), run["commit"])
                runs.setdefault(key, []).append(run)
    lines = [
        "| CPU | cores | Python | torch | megatron-core | commit | checks | days | seconds |",
        "|---" * 9 + "|",
    ]
    for key, same in sorted(runs.items()):
        days = sorted({run["date"][:10] for run in same})
        # A training and the memory that it measures are one run.
        seconds = sum({(run["date"], run["seconds"]): run["seconds"] for run in same}.values())
        period = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
        lines.append(f"| {' | '.join([*key, str(len(same)), period, f'{seconds:,.0f}'])} |")
    return "\n".join(lines)


def renewed(page: str) -> str:
    """The page with the text between `<!-- PART -->` and `<!-- end -->` replaced."""
    all_cards = {c.name: cards.read_card(c) for c in CONFIGURATIONS}
    parts = {
        "reductions": reductions(),
        "tables": tables(all_cards),
        "machines": machines(all_cards.values()),
    }
    for title, text in parts.items():
        page = replace_marked(page, title, text)
    return page


def write() -> None:
    """Renew the page."""
    PAGE.write_text(renewed(PAGE.read_text()))
