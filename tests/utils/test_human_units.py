"""Counts, sizes and durations as a person reads them."""

import pytest

from megatron_sffn.utils.human_size import human_count, human_size
from megatron_sffn.utils.human_time import human_time


@pytest.mark.parametrize(
    ("number", "count", "size"),
    [
        (0, "0 ", "0 B"),
        (999, "999 ", "999 B"),
        (1000, "1.0 k", "1.0 kB"),
        (12_345_678, "12.3 M", "12.3 MB"),
        (2.5e15, "2.5 P", "2.5 PB"),
        (6.1e19, "61.0 E", "61.0 EB"),
    ],
)
def test_numbers_are_scaled_to_one_decimal(number: float, count: str, size: str) -> None:
    assert human_count(number) == count
    assert human_size(number) == size


@pytest.mark.parametrize(
    ("seconds", "text"), [(-1, "0:00:00"), (59.4, "0:00:59"), (3723.4, "1:02:03")]
)
def test_seconds_become_hours_minutes_and_seconds(seconds: float, text: str) -> None:
    assert human_time(seconds) == text
