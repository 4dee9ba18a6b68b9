"""Lists the token ids that characterise a block: more frequent in the block than overall.

Inputs: a `RoutingTrace`. Outputs: rows of a table, also as CSV.

Design notes: ids are ranked by their term of the KL divergence of the block's tokens from all
tokens, `p(id | block) · log (p(id | block) / p(id))`. Ranked by count, every block would show the
most frequent ids of the language; ranked by ratio, it would show ids that occurred once.
"""

from __future__ import annotations

import csv
import io
from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass, fields

import numpy

from megatron_sffn.analysis.measures import Ints, load_of, most_used, token_counts
from megatron_sffn.train.routing_trace import RoutingTrace
from megatron_sffn.utils.errors import ConfigError

Decode = Callable[[int], str]


@dataclass(frozen=True, kw_only=True)
class Served:
    """A token id that characterises a block.

    Args:
        layer: counted from 1.
        block: the block's id.
        load: load of the block, in multiples of an even load.
        rank: 1 for the most characteristic id.
        token_id: the id.
        text: its text.
        count: how often the block served the id.
        share: the id's share of the block's tokens.
        ratio: this share divided by the id's share of all tokens.
    """

    layer: int
    block: int
    load: float
    rank: int
    token_id: int
    text: str
    count: int
    share: float
    ratio: float


def served(
    recording: RoutingTrace, layer: int, decode: Decode, *, blocks: int, ids: int
) -> list[Served]:
    """The token ids that characterise the most used blocks of a layer.

    Args:
        recording: trace of one checkpoint.
        layer: counted from 1.
        decode: maps a token id to text.
        blocks: number of blocks.
        ids: number of token ids per block.
    """
    ids_TK, num_blocks = recording.blocks[layer], recording.num_blocks
    load = load_of(ids_TK, num_blocks)
    block_ids = most_used(load, blocks)
    vocabulary, total = numpy.unique(recording.token_ids, return_counts=True)
    counts = token_counts(ids_TK, recording.token_ids, block_ids, num_blocks)
    overall_share = total / total.sum()
    rows = []
    for block, count in zip(block_ids, counts, strict=True):
        share = count / count.sum()
        ratio = share / overall_share
        gain = share * numpy.log(numpy.maximum(ratio, 1e-12))
        order = [at for at in numpy.argsort(-gain, kind="stable")[:ids] if count[at]]
        rows += [
            Served(
                layer=layer,
                block=int(block),
                load=float(load[block] / load.mean()),
                rank=rank,
                token_id=int(vocabulary[at]),
                text=decode(int(vocabulary[at])),
                count=int(count[at]),
                share=float(share[at]),
                ratio=float(ratio[at]),
            )
            for rank, at in enumerate(order, start=1)
        ]
    return rows


def as_csv(rows: Iterable[Served]) -> str:
    """The rows as CSV with a header."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(item.name for item in fields(Served))
    for row in rows:
        values = astuple(row)
        writer.writerow(f"{v:.6g}" if isinstance(v, float) else v for v in values)
    return buffer.getvalue()


def decoder(args: Namespace, say: Callable[[str], None]) -> Decode:
    """A function from token id to text by the run's tokenizer; without one, to the id itself.

    Args:
        args: the checkpoint's arguments.
        say: called with a message if the tokenizer cannot be loaded.
    """
    from megatron_sffn.data.tokenize.tokenizer import load_tokenizer

    if vars(args).get("tokenizer_type") in (None, "NullTokenizer"):
        return str
    try:
        tokenizer = load_tokenizer(args)
    except ConfigError as error:
        say(f"token ids are shown as numbers: {error}")
        return str

    def decode(token_id: int) -> str:
        try:
            return str(tokenizer.detokenize([token_id]))
        except Exception:  # padding, and other ids for which a tokenizer has no text
            return str(token_id)

    return decode


def shown(text: str, *, drawable: Callable[[str], bool] = str.isascii) -> str:
    """The text with visible spaces and line breaks, and escapes for characters without a glyph.

    Args:
        text: text of a token.
        drawable: True if the font has a glyph for a character.
    """
    visible = {" ": "␣", "\n": "↵", "\t": "⇥"}
    pieces = []
    for sign in text or "∅":
        sign = visible.get(sign, sign)
        fine = sign.isprintable() and (drawable(sign) or sign in "␣↵⇥∅")
        pieces.append(sign if fine else sign.encode("unicode_escape").decode())
    return "".join(pieces)


def shuffled(token_ids: Ints) -> Ints:
    """The ids in random order, for the overlap of blocks that ignore the token ids."""
    return numpy.random.default_rng(0).permutation(token_ids)
