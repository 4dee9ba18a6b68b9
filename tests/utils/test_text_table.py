"""Tables of aligned text."""

from __future__ import annotations

from megatron_sffn.utils.text_table import text_table


def test_the_first_column_is_on_the_left_and_no_line_ends_in_blanks() -> None:
    rows = [("name", "loss", ""), ("a", "1.25", "x"), ("longer", "10", "")]
    assert text_table(rows).splitlines() == ["name    loss", "a       1.25  x", "longer    10"]
