"""Takes the text out of a page of HTML."""

from __future__ import annotations

import re
from html.parser import HTMLParser


def html_to_text(html: str) -> str:
    """The text of a page: a line per block element, `pre` unchanged, without navigation."""
    parser = _TextParser()
    parser.feed(html)
    parser.close()
    text = re.sub(r"[ \t]+\n", "\n", "".join(parser.pieces))
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


class _TextParser(HTMLParser):
    # Tags without an end tag in HTML.
    VOID = re.compile("area|base|br|col|embed|hr|img|input|link|meta|source|track|wbr")
    BLOCK = re.compile(
        "address|article|aside|blockquote|br|dd|div|dl|dt|figure|h[1-6]|hr|li|main|ol|p|pre|section"
        "|table|tr|ul"
    )
    HIDDEN = re.compile("head|title|script|style|nav|footer")
    # Navigation of Sphinx and DocBook pages.
    HIDDEN_CLASS = re.compile(
        "sphinxsidebar|related|headerlink|footer|navheader|navfooter|toc|id_link"
    )

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.pieces: list[str] = []
        self._open: list[str] = []
        # Depth in `_open` of the outermost hidden element, if one is open.
        self._hidden_at: int | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self.BLOCK.fullmatch(tag):
            self._end_line()
        if self.VOID.fullmatch(tag):
            return
        classes = (dict(attrs).get("class") or "").split()
        hidden = self.HIDDEN.fullmatch(tag) or any(map(self.HIDDEN_CLASS.fullmatch, classes))
        if hidden and self._hidden_at is None:
            self._hidden_at = len(self._open)
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self._open:
            # Close the elements inside, too: HTML allows <p> and <li> without an end tag.
            while self._open.pop() != tag:
                pass
        if self._hidden_at is not None and len(self._open) <= self._hidden_at:
            self._hidden_at = None
        if self.BLOCK.fullmatch(tag):
            self._end_line()
            if tag == "p":
                self._emit("\n")
        elif tag in ("td", "th"):
            self._emit(" ")

    def handle_data(self, data: str) -> None:
        if "pre" not in self._open:
            data = re.sub(r"\s+", " ", data)
            if self._at_line_start():
                data = data.lstrip()
        self._emit(data)

    def _emit(self, text: str) -> None:
        if text and self._hidden_at is None:
            self.pieces.append(text)

    def _end_line(self) -> None:
        if not self._at_line_start():
            self._emit("\n")

    def _at_line_start(self) -> bool:
        return not self.pieces or self.pieces[-1].endswith("\n")
