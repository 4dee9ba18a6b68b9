"""All tools refuse unknown flags."""

from __future__ import annotations

import importlib

import pytest

from megatron_sffn.utils.errors import ConfigError
from tests.support.paths import ROOT

TOOLS = sorted(path.stem for path in (ROOT / "tools").glob("*.py"))


@pytest.mark.filterwarnings("ignore:'type' is deprecated:DeprecationWarning")  # Megatron's own
@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("flag", ["--nonsense", "--inp"])
def test_unknown_and_shortened_flags_are_reported_in_one_sentence(tool: str, flag: str) -> None:
    main = importlib.import_module(f"tools.{tool}").main
    with pytest.raises(
        ConfigError, match=r"; --help lists (every flag|our flags, --help-all all)$"
    ):
        main([flag, "x"])
