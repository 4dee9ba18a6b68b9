"""Makes a site of the pages: the hooks of `mkdocs.yml`, which `make docs` runs.

Inputs: `docs/`, and the files of the repository that its pages link to. Outputs: `site/`, which
needs no network.

Design notes: the pages are written for a reader of the repository, so a link may lead to any file
of it. Each file that a page links to is in the site: a page or notebook as a page, a picture as it
is, another file as a page that shows it. The navigation is `docs/README.md`, so that the list of
pages by reader exists once. The first use of a glossary word on a page links to its definition.
"""

from __future__ import annotations

import functools
import html
import itertools
import logging
import os
import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
INDEX = "docs/README.md"
HOME = {"README.md": "index.md", INDEX: "pages.md"}
"""Page of the repository -> its name in the site, where this is not the same."""

FOUND_LAST = ("megatron-flags.md", "repository/CHANGELOG.md")
"""Pages that have every word, which the search lists below others."""

PAGES = (".md", ".ipynb")
PICTURES = (".png", ".svg")
LINK = re.compile(r"(?<=\]\()([^)\s]+)(?=\))")
FILE_LINK = re.compile(r"\[[\w./-]+\.(?:md|ipynb)\](?=\(([^)#\s]+)[^)\s]*\))")
CODE = re.compile(r"(^ *```.*?^ *```\n|`[^`\n]+`)", flags=re.DOTALL | re.MULTILINE)
OWN_SENSE = ("chunk", "combine", "group", "host", "load", "memory", "pair", "patch", "price", "row")
"""Glossary words that pages also use in their everyday sense, which get no link."""

PICTURES_INSIDE = {"ExtractOutputPreprocessor": {"enabled": False}}
"""Setting of nbconvert by which a notebook's pictures are in its page, not in files beside it."""

NUMBERS = itertools.count(1)  # of Mermaid's pictures
LOGGER = logging.getLogger("mkdocs.hooks.build_site")


def on_config(config: MkDocsConfig) -> None:
    """Set the navigation, and draw Mermaid's pictures while the site is built."""
    config.nav = navigation((ROOT / INDEX).read_text())
    fence = {"name": "mermaid", "class": "mermaid", "format": draw}
    if "MIKE_DOCS_VERSION" in os.environ:  # the site becomes one of several versions
        config.extra["version"] = {"provider": "mike"}
    config.mdx_configs["pymdownx.superfences"] = {"custom_fences": [fence]}


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add what pages link to outside docs/, and give the two READMEs their names."""
    from mkdocs.structure.files import File

    by_reader = files.get_file_from_path("README.md")
    if by_reader is not None:
        files.remove(by_reader)
    for path in linked_files():
        uri, text = site_uri(path), shown(path)
        if path in HOME or uri.startswith("repository/"):
            source = {"content": text} if text else {"abs_src_path": str(ROOT / path)}
            files.append(File.generated(config, uri, **source))


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Make links of the repository links of the site."""
    if page.file.src_uri in FOUND_LAST:
        page.meta["search"] = {"boost": 0.3}
    return rewritten(markdown, repository_path(page.file.src_uri))


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Link the words of the glossary."""
    glossary = files.get_file_from_path("glossary.md")
    if glossary is None:
        raise ValueError("docs/glossary.md is missing, to which words are linked")
    if page.file == glossary:
        return with_anchors(content)
    if page.file.src_uri == "api.md":
        return content
    url = glossary.url_relative_to(page.file)
    return with_glossary_links(content, url, definitions((ROOT / "docs/glossary.md").read_text()))


def on_post_page(output: str, page: Page, **_: Any) -> None:
    """Warn, which fails the build, if a page would load something from the network."""
    for tag in re.findall(
        r"<(?:script|link|img)\b[^>]*(?:src|href)=\"?(?:https?:)?//[^>]*>", output
    ):
        LOGGER.warning("%s would load from the network: %s", page.file.src_uri, tag)


def navigation(index: str) -> list[dict[str, list[str | dict[str, str]]]]:
    """The sections of the index and their pages, each page where it is named first."""
    sections: list[dict[str, list[str | dict[str, str]]]] = [
        {"Start": [{"What this is": "index.md"}, {"Pages by reader": "pages.md"}]}
    ]
    listed: set[str] = set()
    for section in index.split("\n## ")[1:]:
        targets = re.findall(r"^\| \[[^\]]+\]\(([^)#]+)\)", section, flags=re.MULTILINE)
        pages = [site_uri(posixpath.normpath(f"docs/{target}")) for target in targets]
        sections.append({section.split("\n")[0]: [uri for uri in pages if uri not in listed]})
        listed.update(pages)
    return sections


def linked_files() -> list[str]:
    """The pages of the site and what they link to, as paths of the repository."""
    found: list[str] = []
    waiting = ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
    while waiting:
        path = waiting.pop()
        if path not in found and (ROOT / path).exists():  # mkdocs reports a link to nothing
            found.append(path)
            if path.endswith(PAGES):
                waiting += [target for target, _ in map(split_link(path), links_of(path)) if target]
    return sorted(found)


def links_of(path: str) -> list[str]:
    """The relative links of a page that lead to another file."""
    text = CODE.sub("", text_of(path))
    return [link for link in LINK.findall(text) if not re.match(r"[a-z]+:|#", link)]


def split_link(page: str) -> Callable[[str], tuple[str, str]]:
    """A function that gives the path in the repository, and the anchor, of a link of a page."""

    def split(link: str) -> tuple[str, str]:
        path, hash_sign, anchor = link.partition("#")
        return posixpath.normpath(posixpath.join(posixpath.dirname(page), path)), hash_sign + anchor

    return split


def site_uri(path: str) -> str:
    """The name in the site of a file or folder of the repository."""
    if path in HOME:
        return HOME[path]
    if path.startswith("docs/") and (ROOT / path).is_file():
        return path.removeprefix("docs/")
    return f"repository/{path}" if path.endswith((".md", *PICTURES)) else f"repository/{path}.md"


def repository_path(uri: str) -> str:
    """The path in the repository of a page of the site."""
    for path, name in HOME.items():
        if name == uri:
            return path
    return uri.removeprefix("repository/") if uri.startswith("repository/") else f"docs/{uri}"


def shown(path: str) -> str | None:
    """The page of a notebook, another file or a folder; None for a page or picture itself."""
    file = ROOT / path
    if file.is_dir():
        names = sorted(child.name for child in file.iterdir() if not child.name.startswith("__"))
        return "\n".join([f"# {path}/", "", *(f"- `{name}`" for name in names), ""])
    if file.suffix in (".md", *PICTURES):
        return None
    if file.suffix == ".ipynb":
        return text_of(path)
    language = {".sh": "bash", ".yaml": "yaml", ".py": "python"}.get(file.suffix, "")
    return (
        f"---\nsearch: {{exclude: true}}\n---\n# {path}\n\n````{language}\n{file.read_text()}````\n"
    )


@functools.cache
def text_of(path: str) -> str:
    """The Markdown of a page, or of a notebook with its outputs and pictures."""
    if path.endswith(".md"):
        return (ROOT / path).read_text()
    from nbconvert import MarkdownExporter

    exporter = MarkdownExporter(config=PICTURES_INSIDE)
    return str(exporter.from_filename(str(ROOT / path))[0])


def rewritten(markdown: str, path: str) -> str:
    """The text of a page with links of the site, which name a page by its title.

    Args:
        markdown: the text.
        path: of the page, in the repository.
    """
    folder = posixpath.dirname(site_uri(path))

    def site_link(match: re.Match[str]) -> str:
        link = match[0]
        if re.match(r"[a-z]+:|#", link):
            return link
        target, anchor = split_link(path)(link)
        return posixpath.relpath(site_uri(target), folder or ".") + anchor

    def title(match: re.Match[str]) -> str:
        target = split_link(path)(match[1])[0]
        text = text_of(target) if (ROOT / target).exists() else ""
        heading = re.search(r"^# (.*)$", text, flags=re.MULTILINE)
        return f"[{heading[1]}]" if heading else match[0]

    parts = CODE.split(markdown)
    for number, part in enumerate(parts):
        if number % 2 == 0:  # the others are code
            parts[number] = LINK.sub(site_link, FILE_LINK.sub(title, part))
    return "".join(parts)


def draw(source: str, *_: Any, **__: Any) -> str:
    """Draw a Mermaid picture; in grey, of which the style sheet makes a dark one."""
    import mermaidx

    svg = mermaidx.render(source, theme="neutral").svg()
    name = re.search(r'<svg[^>]* id="([^"]+)"', svg)
    if name is not None:  # pictures of one page must not share a style
        svg = svg.replace(name[1], f"picture-{next(NUMBERS)}")
    # On a narrow screen a wide picture scrolls, and stays readable.
    readable = r"max-width: \1; min-width: min(\1, 36rem)"
    svg = re.sub(r"max-width: ([\d.]+px)", readable, svg, count=1)
    return f'<div class="picture">{svg}</div>'


def definitions(glossary: str) -> dict[str, str]:
    """Word of the glossary -> its meaning, without letters and words of several senses."""
    rows = re.findall(r"^\| ([^|]+) \| [^|]+ \| ([^|]+) \|$", glossary, flags=re.MULTILINE)
    plain = {word: re.sub(r"\[([^\]]+)\]\([^)]+\)|`", r"\1", text) for word, text in rows}
    words = {
        name: text
        for cell, text in plain.items()
        for name in re.sub(r" \(.*\)|`", "", cell).split(", ")
        if len(name) > 1 and name not in (*OWN_SENSE, "our word", "letter")
    }
    return dict(sorted(words.items(), key=lambda item: -len(item[0])))


def anchor_of(word: str) -> str:
    """The anchor of a word in the glossary."""
    return f"word-{word.replace(' ', '-').lower()}"


def with_anchors(content: str) -> str:
    """The glossary, with an anchor for each word."""

    def cell(match: re.Match[str]) -> str:
        names = re.sub(r"<[^>]+>| \(.*\)", "", match[1]).split(", ")
        spans = "".join(f'<span id="{anchor_of(name)}"></span>' for name in names)
        return f"<tr>\n<td>{spans}{match[1]}</td>"

    return re.sub(r"<tr>\n<td>(.*?)</td>", cell, content)


def with_glossary_links(content: str, url: str, words: dict[str, str]) -> str:
    """A page in which the first use of each word links to the glossary.

    Args:
        content: HTML of the page.
        url: of the glossary.
        words: word -> meaning, long words first.
    """
    waiting = dict(words)
    depth = 0  # of elements in which no word is linked

    def link(match: re.Match[str]) -> str:
        word = next(w for w in words if w.lower() == match[1].lower())
        if waiting.pop(word, None) is None:
            return match[0]
        title = html.escape(words[word], quote=True)
        return f'<a class="glossary" href="{url}#{anchor_of(word)}" title="{title}">{match[0]}</a>'

    names = "|".join(map(re.escape, words))
    pattern = re.compile(rf"(?<![\w-])({names})(s?)(?![\w-])", flags=re.IGNORECASE)
    parts = re.split(r"(<[^>]+>)", content)
    for number, part in enumerate(parts):
        tag = re.match(r"<(/?)(a|code|pre|h[1-6]|svg|style|th)\b", part)
        if tag:
            depth += -1 if tag[1] else 1
        elif depth == 0 and not part.startswith("<"):
            parts[number] = pattern.sub(link, part)
    return "".join(parts)
