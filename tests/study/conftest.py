"""Files of studies whose runs take seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.pretraining import MODEL

WriteStudy = Callable[..., Path]


@pytest.fixture
def write_study(text: str, tmp_path: Path) -> WriteStudy:
    """`write_study(points, **keys)` writes the file of a study of tiny models; returns its path."""

    def write(points: Any, *, flags: str = "", file: str = "study.yaml", **keys: Any) -> Path:
        content = {
            "folder": str(tmp_path / "results"),
            "flags": f"{MODEL} --data-path {text} --split 90,10,0 {flags}",
            "points": points,
            **{key.replace("_", "-"): value for key, value in keys.items()},
        }
        path = tmp_path / file
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    return write
