"""Encoding of (row, block) pairs and gates as bytes, so that one collective carries both.

Design notes:
- A block id has 2 bytes if all ids fit, else 4. This follows from the number of blocks alone, so
  all ranks agree without communication. A gate has the bytes of its dtype.
- The all-to-all sends no row indices. Every sent row has at least one pair, and pairs are sorted by
  row, so one bit per pair, "this pair begins the next row", is enough: the receiver numbers the
  rows of all senders by a cumulative sum of the bits. The bit is the sign of the block id.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_sffn.nn.comm_volume import id_bytes
from megatron_sffn.ops.block_ffn import Pairs

_DTYPES = {2: torch.int16, 4: torch.int32}


def id_dtype(num_blocks: int) -> torch.dtype:
    """The narrowest dtype that holds block ids below `num_blocks` and their complements."""
    return _DTYPES[id_bytes(num_blocks)]


def encode(blocks: Tensor, begins_row: Tensor, num_blocks: int) -> Tensor:
    """Encode pairs as narrow integers: b, or the complement -b - 1 if the pair begins a row.

    Args:
        blocks: `[P]` block ids below `num_blocks`.
        begins_row: `[P]` bool.
        num_blocks: number of blocks on the receiving rank.
    """
    return torch.where(begins_row, ~blocks, blocks).to(id_dtype(num_blocks))


def decode(codes: Tensor) -> Pairs:
    """Decode the pairs of all senders, one sender after the other."""
    begins_row = codes < 0
    blocks = torch.where(begins_row, ~codes, codes).int()
    return Pairs(rows=begins_row.cumsum(0, dtype=torch.int32) - 1, blocks=blocks)


def pack(integers: Tensor, gates: Tensor | None) -> Tensor:
    """Pack integers `[P]`, and gates `[P]` if there are any, into bytes `[P, bytes per pair]`."""
    columns = [integers.view(-1, 1).contiguous().view(torch.uint8)]
    if gates is not None:
        columns.append(gates.view(-1, 1).contiguous().view(torch.uint8))
    return torch.cat(columns, dim=1)


def unpack(
    message: Tensor, int_dtype: torch.dtype, gate_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None]:
    """Unpack the integers and the gates of a message.

    Args:
        message: uint8 `[P, bytes per pair]`.
        int_dtype: dtype of the integers.
        gate_dtype: dtype of the gates; None if there are none.
    """
    # Clones, because a slice of at most one row counts as contiguous but can begin at an address
    # that is not aligned for the wider dtype.
    dense = torch.contiguous_format
    int_bytes = message[:, : int_dtype.itemsize].clone(memory_format=dense)
    integers = int_bytes.view(int_dtype).view(-1)
    if gate_dtype is None:
        return integers, None
    gate_bytes = message[:, int_dtype.itemsize :].clone(memory_format=dense)
    return integers, gate_bytes.view(gate_dtype).view(-1)
