"""Draw the packages of `docs/architecture.md` from the code: `python -m docs.draw_architecture`.

Inputs: the import contracts in `pyproject.toml`, whose layers are the floors of a picture, and the
imports between modules. Outputs: the page, with the Mermaid pictures and counts between its markers
renewed.

Design notes: an arrow that a longer path of arrows implies is left out of a picture, so that the
order of the packages can be seen; the counts include every arrow.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grimp

from docs.marked_text import replace_marked

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"


@dataclass(frozen=True, kw_only=True)
class Floors:
    """The packages and modules that lie directly in a package, and what they import.

    Args:
        container: name of the package.
        floors: names from the highest floor to the lowest, as the import contract lists them.
        arrows: (importer, imported) between them.
    """

    container: str
    floors: tuple[tuple[str, ...], ...]
    arrows: frozenset[tuple[str, str]]

    @property
    def counts(self) -> str:
        """The size of the graph, as the page says it."""
        names = sum(map(len, self.floors))
        return f"{names} packages and modules, {len(self.floors)} floors, {len(self.arrows)} arrows"

    def reduced_arrows(self) -> list[tuple[str, str]]:
        """The arrows that no longer path implies (the transitive reduction of the graph)."""
        return sorted(
            (importer, imported)
            for importer, imported in self.arrows
            if not any(
                imported in self._all_imported_by(between)
                for other, between in self.arrows
                if other == importer and between != imported
            )
        )

    def _all_imported_by(self, name: str) -> set[str]:
        """Everything that a package imports, directly or not."""
        direct = {imported for importer, imported in self.arrows if importer == name}
        return direct.union(*map(self._all_imported_by, direct))

    def mermaid(self) -> str:
        """A Mermaid flowchart.

        It has no boxes around floors: Mermaid would end the arrows at the boxes.
        """
        lines = ["```mermaid", "flowchart TB"]
        lines += [f'    {_identifier(name)}["{name}"]' for names in self.floors for name in names]
        lines += [f"    {_identifier(a)} --> {_identifier(b)}" for a, b in self.reduced_arrows()]
        return "\n".join([*lines, "```"])


def _identifier(name: str) -> str:
    """A node's identifier: a bare name could be a keyword of Mermaid's, such as `end`."""
    return f"package_{name.strip('_')}"


def floors_of(contract: dict[str, Any], graph: grimp.ImportGraph) -> Floors:
    """The packages of one import contract.

    Args:
        contract: of type `layers`, with one container.
        graph: imports between all modules.
    """
    (container,) = contract["containers"]
    floors = tuple(
        tuple(name.strip(" ()") for name in floor.split("|")) for floor in contract["layers"]
    )
    names, prefix = {name for floor in floors for name in floor}, f"{container}."

    def top_name(module: str) -> str:
        return module.removeprefix(prefix).partition(".")[0]

    imports = {
        (top_name(module), top_name(imported))
        for module in graph.modules
        if module.startswith(prefix)
        for imported in graph.find_modules_directly_imported_by(module)
        if imported.startswith(prefix)
    }
    arrows = frozenset((a, b) for a, b in imports if a != b and {a, b} <= names)
    return Floors(container=container, floors=floors, arrows=arrows)


def sections() -> dict[str, str]:
    """Container -> picture and counts, for every contract that has floors."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    graph = grimp.build_graph(settings["root_package"], cache_dir=None)
    drawn = {}
    for contract in settings["contracts"]:
        if contract["type"] == "layers":
            floors = floors_of(contract, graph)
            drawn[floors.container] = f"{floors.mermaid()}\n\n{floors.counts}."
    return drawn


def renewed(page: str) -> str:
    """The page with the text between `<!-- CONTAINER -->` and `<!-- end -->` replaced."""
    for container, text in sections().items():
        page = replace_marked(page, container, text)
    return page


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text()))
