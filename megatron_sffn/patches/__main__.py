"""`python -m megatron_sffn.patches`: print every name of torch and Megatron that we replace."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_sffn.patches import PATCHES_BY_OCCASION
from megatron_sffn.utils.errors import CommandParser, run_command

DESCRIPTION = """\
Print every name of torch and Megatron that megatron-sffn replaces, grouped by when it is replaced,
with the code that needs it, what goes wrong without it, and the change that makes it unnecessary.
"""


def table() -> str:
    """All patches, under a heading for each occasion."""
    lines = []
    for occasion, patches in PATCHES_BY_OCCASION.items():
        lines.append(f"{occasion}: {len(patches)}")
        for patch in patches:
            lines.append(f"  {patch.target}")
            for column in ("needed_by", "why", "until"):
                lines.append(f"    {column:9}  {getattr(patch, column)}")
        lines.append("")
    return "\n".join(lines[:-1])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = CommandParser(prog="python -m megatron_sffn.patches", description=DESCRIPTION)
    parser.parse_args(argv)
    print(table())
    return 0


if __name__ == "__main__":
    run_command(main)
