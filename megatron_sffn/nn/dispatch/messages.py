"""Small integers and gates as one message of bytes, so that a collective carries both.

An integer takes 2 bytes where all possible ones fit, else 4. Which it is follows from the number of
blocks alone, so that all ranks agree. A gate has the bytes of its dtype.

Pairs of the all-to-all are a block id and one bit, "this pair begins the next row", as the id's
sign. No row index travels: every row that is sent has a pair, and pairs come row by row, so that a
running count of the bits numbers the rows of all senders.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_sffn.nn.comm_volume import id_bytes
from megatron_sffn.ops.block_ffn import Pairs

_DTYPES = {2: torch.int16, 4: torch.int32}


def id_dtype(num_blocks: int) -> torch.dtype:
    """The narrowest integer for block ids below `num_blocks`, and as many negative ones."""
    return _DTYPES[id_bytes(num_blocks)]


def encode(blocks: Tensor, begins_row: Tensor, num_blocks: int) -> Tensor:
    """`[P]` blocks and bools to `[P]` narrow integers: b, or -b - 1 where a row begins."""
    return torch.where(begins_row, ~blocks, blocks).to(id_dtype(num_blocks))


def decode(codes: Tensor) -> Pairs:
    """The pairs of encoded integers of all senders, one after the other."""
    begins_row = codes < 0
    blocks = torch.where(begins_row, ~codes, codes).int()
    return Pairs(rows=begins_row.cumsum(0, dtype=torch.int32) - 1, blocks=blocks)


def pack(integers: Tensor, gates: Tensor | None) -> Tensor:
    """`[P]` integers, and `[P]` gates or None, to bytes `[P, bytes of both]`."""
    parts = [integers.view(-1, 1).contiguous().view(torch.uint8)]
    if gates is not None:
        parts.append(gates.view(-1, 1).contiguous().view(torch.uint8))
    return torch.cat(parts, dim=1)


def unpack(
    message: Tensor, integers: torch.dtype, gates: torch.dtype | None
) -> tuple[Tensor, Tensor | None]:
    """The integers and the gates of a packed message.

    Args:
        message: `[P, bytes of both]`.
        integers: their dtype.
        gates: their dtype; None where there are none.
    """
    # Clones, since a view of at most one pair is contiguous already, but begins at an odd address.
    dense = torch.contiguous_format
    first = message[:, : integers.itemsize].clone(memory_format=dense).view(integers).view(-1)
    if gates is None:
        return first, None
    last = message[:, integers.itemsize :].clone(memory_format=dense)
    return first, last.view(gates).view(-1)
