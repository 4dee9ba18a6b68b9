"""The tutorial's notebook, executed from its first cell to its last on a small text."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.support.paths import ROOT

nbformat = pytest.importorskip("nbformat", reason="the extra tutorial is not installed")
from nbclient import NotebookClient  # noqa: E402  (after the check that it is there)

NOTEBOOK = ROOT / "examples" / "tutorial" / "tutorial.ipynb"


def outputs(notebook: nbformat.NotebookNode) -> str:
    """What the cells printed."""
    return "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])
    )


def test_the_notebook_runs_from_the_first_cell_to_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUTORIAL_TEXT", str(Path(asyncio.__file__).parent))
    monkeypatch.setenv("TUTORIAL_STEPS", "4")
    monkeypatch.setenv("TUTORIAL_RUNS", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(NOTEBOOK, nbformat.NO_CONVERT)
    NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOK.parent)}}
    ).execute()
    text = outputs(notebook)
    assert "the layer computes the same function" in text
    assert "SparseFFNGPTForCausalLM" in text
    images = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in images)


def test_the_committed_notebook_was_executed_in_order_without_errors() -> None:
    notebook = nbformat.read(NOTEBOOK, nbformat.NO_CONVERT)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)
