"""Which token ids a block serves: those that are more frequent in it than anywhere.

Enters: a `RoutingTrace`. Leaves: rows of a table, also as CSV.

Choice: ids are ranked by what they add to the divergence of the block's tokens from all tokens,
`p(id | block) · log (p(id | block) / p(id))`. Ranked by their number alone, every block would show
the most frequent ids of the language; ranked by the ratio alone, ids that occurred once.
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
    """A token id of a block.

    Args:
        layer: counted from 1.
        block: its number.
        load: of the block, in multiples of an even one.
        rank: 1 for the id that marks the block most.
        token_id: the id.
        text: what it stands for.
        count: how often the block served it.
        share: of the block's tokens.
        ratio: that share over the id's share of all tokens.
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
    """The ids that mark the most used blocks of a layer.

    Args:
        recording: of one checkpoint.
        layer: counted from 1.
        decode: token id to text.
        blocks: how many.
        ids: how many of each.
    """
    chosen_of, num_blocks = recording.blocks[layer], recording.num_blocks
    load = load_of(chosen_of, num_blocks)
    chosen = most_used(load, blocks)
    known, total = numpy.unique(recording.token_ids, return_counts=True)
    counts = token_counts(chosen_of, recording.token_ids, chosen, num_blocks)
    everywhere = total / total.sum()
    rows = []
    for block, count in zip(chosen, counts, strict=True):
        share = count / count.sum()
        ratio = share / everywhere
        gain = share * numpy.log(numpy.maximum(ratio, 1e-12))
        order = [at for at in numpy.argsort(-gain, kind="stable")[:ids] if count[at]]
        rows += [
            Served(
                layer=layer,
                block=int(block),
                load=float(load[block] / load.mean()),
                rank=rank,
                token_id=int(known[at]),
                text=decode(int(known[at])),
                count=int(count[at]),
                share=float(share[at]),
                ratio=float(ratio[at]),
            )
            for rank, at in enumerate(order, start=1)
        ]
    return rows


def as_csv(rows: Iterable[Served]) -> str:
    """A table with a head."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(item.name for item in fields(Served))
    for row in rows:
        values = astuple(row)
        writer.writerow(f"{v:.6g}" if isinstance(v, float) else v for v in values)
    return buffer.getvalue()


def decoder(args: Namespace, say: Callable[[str], None]) -> Decode:
    """Token id to text with the tokenizer of a run; the id itself where there is none.

    Args:
        args: the checkpoint's.
        say: told when the tokenizer is not there any more.
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
        except Exception:  # padding, and whatever else a tokenizer has no text for
            return str(token_id)

    return decode


def shown(text: str, *, drawable: Callable[[str], bool] = str.isascii) -> str:
    """Text with its spaces and breaks visible, and escapes for what cannot be drawn.

    Args:
        text: of a token.
        drawable: whether there is a glyph for a character.
    """
    visible = {" ": "␣", "\n": "↵", "\t": "⇥"}
    pieces = []
    for sign in text or "∅":
        sign = visible.get(sign, sign)
        fine = sign.isprintable() and (drawable(sign) or sign in "␣↵⇥∅")
        pieces.append(sign if fine else sign.encode("unicode_escape").decode())
    return "".join(pieces)


def shuffled(token_ids: Ints) -> Ints:
    """The same ids given to other tokens: what overlap would be if blocks did not look at them."""
    return numpy.random.default_rng(0).permutation(token_ids)
