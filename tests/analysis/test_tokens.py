"""The table of token ids: what marks a block comes first, and every text can be drawn."""

from __future__ import annotations

import csv
import io
from argparse import Namespace

import numpy
import pytest

from megatron_sffn.analysis import tokens
from megatron_sffn.train.routing_trace import RoutingTrace

# Id 5 is everywhere; id 7 is block 2's own; id 9 was seen once.
IDS = numpy.array([5] * 60 + [7] * 20 + [9])
BLOCKS = numpy.array([[0, 1]] * 40 + [[1, 2]] * 20 + [[2, 3]] * 20 + [[2, 3]])
RECORDING = RoutingTrace(token_ids=IDS, blocks={4: BLOCKS}, num_blocks=6)


def test_ids_that_mark_a_block_come_first() -> None:
    rows = tokens.served(RECORDING, 4, "t{}".format, blocks=6, ids=2)
    assert list(dict.fromkeys(row.block for row in rows)) == [1, 2, 0, 3]
    first = [row for row in rows if row.block == 2]
    assert [(row.rank, row.token_id, row.text, row.count) for row in first] == [
        (1, 7, "t7", 20),
        (2, 9, "t9", 1),
    ]
    assert first[0].share == pytest.approx(20 / 41)
    assert first[0].ratio == pytest.approx(20 / 41 / (20 / 81))
    assert first[0].load == pytest.approx(41 / (162 / 6))
    # A block of one id alone has no second.
    assert [row.token_id for row in rows if row.block == 1] == [5]


def test_csv_keeps_any_text() -> None:
    texts = ['a "quote", and', "line\nbreak", "日本"]
    rows = tokens.served(RECORDING, 4, lambda one: texts[one % 3], blocks=1, ids=1)
    (read,) = csv.DictReader(io.StringIO(tokens.as_csv(rows)))
    assert (read["text"], read["token_id"]) == (texts[5 % 3], "5")
    assert float(read["ratio"]) == pytest.approx(rows[0].ratio, rel=1e-5)


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
def test_what_cannot_be_drawn_is_escaped(text: str, expected: str) -> None:
    assert tokens.shown(text, drawable=lambda sign: ord(sign) < 256) == expected


def test_ids_where_there_is_no_tokenizer() -> None:
    said: list[str] = []
    assert tokens.decoder(Namespace(tokenizer_type="NullTokenizer"), said.append)(17) == "17"
    assert said == []
    gone = Namespace(
        tokenizer_type="HuggingFaceTokenizer",
        tokenizer_model="/nowhere/tokenizer",
        vocab_file=None,
        merge_file=None,
    )
    assert tokens.decoder(gone, said.append)(17) == "17"
    assert "/nowhere/tokenizer does not exist" in said[0]
