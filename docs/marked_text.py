"""Replaces the part of a page that a command makes, between `<!-- TITLE -->` and `<!-- end -->`."""

from __future__ import annotations

END = "<!-- end -->"


def replace_marked(page: str, title: str, text: str) -> str:
    """The page with the text behind the marker of a title replaced.

    Raises:
        ValueError: if the page has no such marker.
    """
    begin = f"<!-- {title} -->\n"
    before, marker, rest = page.partition(begin)
    if not marker:
        raise ValueError(f"the page has no marker {begin.strip()}")
    return f"{before}{begin}\n{text}\n\n{END}{rest.partition(END)[2]}"
