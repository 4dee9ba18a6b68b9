"""The table of token ids starts with those typical of a block, and every text can be drawn."""

from __future__ import annotations

import csv
import io
from argparse import Namespace

import numpy
import pytest

from megatron_sffn.analysis import tokens
from megatron_sffn.train.routing_trace import RoutingTrace

# Many blocks have id 5, only blocks 2 and 3 have id 7, and id 9 occurs once.
IDS = numpy.array([5] * 60 + [7] * 20 + [9])
BLOCKS = numpy.array([[0, 1]] * 40 + [[1, 2]] * 20 + [[2, 3]] * 20 + [[2, 3]])
RECORDING = RoutingTrace(token_ids=IDS, blocks={4: BLOCKS}, num_blocks=6)


def test_ids_that_are_typical_of_a_block_come_first() -> None:
    rows = tokens.served(RECORDING, 4, "t{}".format, blocks=6, ids=2)
    assert list(dict.fromkeys(row.block for row in rows)) == [1, 2, 0, 3]
    rows_of_block_2 = [row for row in rows if row.block == 2]
    assert [(row.rank, row.token_id, row.text, row.count) for row in rows_of_block_2] == [
        (1, 7, "t7", 20),
        (2, 9, "t9", 1),
    ]
    assert rows_of_block_2[0].share == pytest.approx(20 / 41)
    assert rows_of_block_2[0].ratio == pytest.approx(20 / 41 / (20 / 81))
    assert rows_of_block_2[0].load == pytest.approx(41 / (162 / 6))
    # A block with a single id has no second row.
    assert [row.token_id for row in rows if row.block == 1] == [5]


def test_csv_keeps_any_text() -> None:
    texts = ['a "quote", and', "line\nbreak", "日本"]
    rows = tokens.served(RECORDING, 4, lambda token_id: texts[token_id % 3], blocks=1, ids=1)
    (csv_row,) = csv.DictReader(io.StringIO(tokens.as_csv(rows)))
    assert (csv_row["text"], csv_row["token_id"]) == (texts[5 % 3], "5")
    assert float(csv_row["ratio"]) == pytest.approx(rows[0].ratio, rel=1e-5)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" the", "␣the"),
        ("\n\t", "↵⇥"),
        ("", "∅"),
        ("$x^2$", "$x^2$"),
        ("é日", "é\\u65e5"),
        ("\ufffd\x00", "\\ufffd\\x00"),
    ],
)
def test_characters_that_cannot_be_drawn_are_escaped(text: str, expected: str) -> None:
    assert tokens.shown(text, drawable=lambda sign: ord(sign) < 256) == expected


def test_without_a_tokenizer_ids_are_shown() -> None:
    log: list[str] = []
    assert tokens.decoder(Namespace(tokenizer_type="NullTokenizer"), log.append)(17) == "17"
    assert log == []
    missing_tokenizer = Namespace(
        tokenizer_type="HuggingFaceTokenizer",
        tokenizer_model="/nowhere/tokenizer",
        vocab_file=None,
        merge_file=None,
    )
    assert tokens.decoder(missing_tokenizer, log.append)(17) == "17"
    assert "/nowhere/tokenizer does not exist" in log[0]
