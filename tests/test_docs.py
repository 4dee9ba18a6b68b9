"""The pages of docs/ match the tree: links, paths, pictures, and codes of checks."""

from __future__ import annotations

import importlib
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import megatron_sffn
from docs import build_site, draw_architecture, draw_gallery, tabulate_flags
from megatron_sffn import accounting, ops
from megatron_sffn.nn.routers import ROUTERS
from tests.support.paths import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])
CURRENT_PAGES = [page for page in PAGES if page.name != "CHANGELOG.md"]
"""The changelog is a history: it may name files that are gone."""

TREES = ("megatron_sffn", "tests", "tools", "examples", "benchmarks", "docker", "docs")
METHODS = (ROOT / "docs" / "methods.md").read_text()


def page_id(page: Path) -> str:
    """The path of a page, for test ids."""
    return str(page.relative_to(ROOT))


def without_code(text: str) -> str:
    """The text of a page without its code blocks."""
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", without_code(page.read_text()), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_to_existing_files_and_headings(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page_id(page)}: {target}"
        assert not anchor or anchor in anchors(file), f"{page_id(page)}: {target}"


@pytest.mark.parametrize("page", CURRENT_PAGES, ids=page_id)
def test_paths_in_code_font_exist(page: Path) -> None:
    for path in re.findall(r"`([\w./*-]+)`", without_code(page.read_text())):
        if path.startswith(tuple(f"{tree}/" for tree in TREES)):
            assert list(ROOT.glob(path.rstrip("/"))), f"{page_id(page)}: {path}"


def test_the_index_lists_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    for page in ROOT.glob("docs/*.md"):
        assert page.name == "README.md" or f"({page.name})" in index, page.name


def test_the_site_has_every_page_and_every_file_that_a_page_links_to() -> None:
    sections = build_site.navigation((ROOT / "docs" / "README.md").read_text())
    listed = [uri for section in sections[1:] for uris in section.values() for uri in uris]
    assert len(listed) == len(set(map(str, listed)))
    assert {page.name for page in ROOT.glob("docs/*.md")} - {"README.md"} <= set(listed)
    uris = {build_site.site_uri(path) for path in build_site.linked_files()}
    for path in build_site.linked_files():
        if path.endswith(build_site.PAGES):
            page = build_site.rewritten(build_site.text_of(path), path)
            folder = posixpath.dirname(build_site.site_uri(path))
            for target in re.findall(r"\]\(([^)#\s]+)[^)\s]*\)", build_site.CODE.sub("", page)):
                uri = posixpath.normpath(posixpath.join(folder, target))
                assert re.match("[a-z]+:", target) or uri in uris, f"{path}: {target}"


def test_a_notebook_is_a_page_with_its_outputs_and_pictures() -> None:
    page = build_site.shown("examples/tutorial/tutorial.ipynb")
    assert page is not None
    assert page.startswith("# From text to the answer\n")
    assert "```python\n" in page
    assert "perplexity" in page
    assert "](data:image/png;base64," in page


def test_the_first_use_of_a_glossary_word_links_to_its_definition() -> None:
    words = build_site.definitions((ROOT / "docs" / "glossary.md").read_text())
    assert words["block size"] == "The number of cells in a block, --sffn-block-size."
    text = "<h1>Blocks</h1><p>Block size, <code>block</code>, two blocks, a block.</p>"
    linked = build_site.with_glossary_links(text, "glossary.html", words)
    assert re.sub(r' (href|title)="[^"]*"', "", linked) == (
        '<h1>Blocks</h1><p><a class="glossary">Block size</a>, <code>block</code>, '
        'two <a class="glossary">blocks</a>, a block.</p>'
    )
    assert f'href="glossary.html#{build_site.anchor_of("block size")}"' in linked
    page = build_site.with_anchors("<tr>\n<td>block size, g</td>\n<td>granularity</td>\n</tr>")
    assert f'id="{build_site.anchor_of("block size")}"' in page


def test_the_python_page_has_every_public_name() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    homes = {name: home for home, name in re.findall(r"^::: (\S+)\.(\w+)$", page, re.MULTILINE)}
    configs = [config.__name__ for config in ROUTERS.values()]
    assert homes.keys() >= {*megatron_sffn.__all__, *ops.__all__, *accounting.__all__, *configs}
    for name, module in homes.items():
        assert getattr(importlib.import_module(module), name).__module__ == module


def test_the_pictures_match_the_code() -> None:
    page = draw_architecture.PAGE.read_text()
    assert page == draw_architecture.renewed(page), "run python -m docs.draw_architecture"


def test_the_tables_of_flags_match_the_sweep() -> None:
    page = tabulate_flags.PAGE.read_text()
    assert page == tabulate_flags.renewed(page), "run python -m docs.tabulate_flags"


def test_the_gallery_shows_every_figure_with_its_command_and_time() -> None:
    page, manifest = draw_gallery.PAGE.read_text(), draw_gallery.read_manifest()
    assert page == draw_gallery.renewed(page), "run python -m docs.draw_gallery"
    # A command, or a text, that has changed since shows on the page of today only.
    assert set(manifest) == {figure.name for figure in draw_gallery.FIGURES}
    for figure in draw_gallery.FIGURES:
        assert manifest[figure.name]["command"] == figure.command
    drawn = {path.name for path in draw_gallery.FOLDER.iterdir()}
    data = {Path(path).name for entry in manifest.values() for path in entry["data"]}
    assert drawn <= data | set(manifest), "a file that no figure has"


def test_no_figure_of_the_gallery_is_older_than_its_data() -> None:
    manifest = draw_gallery.read_manifest()
    assert draw_gallery.stale(manifest) == []
    name = next(iter(manifest))
    (path,) = manifest[name]["data"]
    manifest[name]["data"][path] = "0"
    assert draw_gallery.stale(manifest) == [f"{name}: {path} has changed since it was drawn"]
    manifest[name]["sha256"] = "0"
    assert len(draw_gallery.stale(manifest)) == 2


def table_rows() -> Iterator[tuple[str, str, str]]:
    """Question, folder and answer of each row of the table "Where is …"."""
    table = draw_architecture.PAGE.read_text().split("## Where is …")[1].split("\n## ")[0]
    for row in re.findall(r"^\| (.*) \|$", table, flags=re.MULTILINE):
        question, folder, answer = row.split(" | ")
        if not question.startswith(("where is", "---")):
            yield question, folder.strip("`"), answer


@pytest.mark.parametrize(
    ("folder", "answer"), [pytest.param(*row, id=question) for question, *row in table_rows()]
)
def test_the_folders_files_and_symbols_of_the_table_exist(folder: str, answer: str) -> None:
    assert (ROOT / folder).is_dir(), folder
    for path, symbol in re.findall(r"`([\w/]+\.py)`(?:: `(\w+)`)?", answer):
        file = ROOT / path if path.startswith(TREES) else ROOT / folder / path
        assert file.exists(), path
        assert not symbol or re.search(rf"(def|class) {symbol}\b", file.read_text()), symbol


def test_every_code_in_a_test_name_is_defined() -> None:
    defined = {code.lower() for code in re.findall(r"^\| ([A-Z]\d) \|", METHODS, re.MULTILINE)}
    for file in ROOT.glob("tests/**/test_*.py"):
        for name in re.findall(r"^def test_((?:[a-z]\d_)+)", file.read_text(), re.MULTILINE):
            assert defined >= set(name.strip("_").split("_")), f"{file}: {name}"
