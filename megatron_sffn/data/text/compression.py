"""Compressed files, read to their last byte.

Inputs: an open file, and the ending that names its compression. Outputs: a stream of its content.

Design notes:
- A file may consist of several streams, as `cat a.xz b.xz` makes it. Python's `lzma` and `bz2`
  modules end silently at unknown bytes after a stream, so they would lose the streams behind
  padding and would not report damage. `_Streams` decompresses such files stream by stream.
- The window of `zstd --long=31`, 2 GB, is allowed: published dumps are compressed so.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from collections.abc import Callable
from typing import Any, BinaryIO, cast, override

from backports import zstd

COMPRESSIONS: dict[str, Any] = {".gz": gzip, ".bz2": bz2, ".xz": lzma, ".zst": zstd}
"""Ending -> module that decompresses it."""

READ_BYTES = 1 << 16
XZ_PADDING = 4
"""The padding between streams of .xz is a multiple of this many zeros."""


def decompressed(raw: BinaryIO, compression: str) -> BinaryIO:
    """A stream of the decompressed content of a file.

    Args:
        raw: the open file.
        compression: ending, such as `.gz`; empty if the file is not compressed.
    """
    if compression == ".xz":
        return cast(BinaryIO, io.BufferedReader(_Streams(raw, lzma.LZMADecompressor, XZ_PADDING)))
    if compression == ".bz2":
        return cast(BinaryIO, io.BufferedReader(_Streams(raw, bz2.BZ2Decompressor, 1)))
    if compression == ".zst":
        options: dict[int, int] = {zstd.DecompressionParameter.window_log_max: 31}
        return cast(BinaryIO, zstd.open(raw, options=options))
    return cast(BinaryIO, COMPRESSIONS[compression].open(raw)) if compression else raw


class _Streams(io.RawIOBase):
    """The content of consecutive compressed streams, with zeros as padding between them.

    Args:
        raw: the open file.
        new_decompressor: makes a decompressor of one stream.
        padding_multiple: the number of zeros between two streams is a multiple of this.
    """

    def __init__(
        self, raw: BinaryIO, new_decompressor: Callable[[], Any], padding_multiple: int
    ) -> None:
        self._raw, self._new_decompressor = raw, new_decompressor
        self._padding_multiple = padding_multiple
        self._stream: Any = new_decompressor()
        self._input = b""
        self._position = 0

    @override
    def readable(self) -> bool:
        return True

    @override
    def seekable(self) -> bool:
        return True

    @override
    def tell(self) -> int:
        return self._position

    @override
    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Read up to an offset: a seek backwards is not possible."""
        if whence != io.SEEK_SET or offset < self._position:
            raise io.UnsupportedOperation("only forwards, from the start")
        while self._position < offset and self._content(min(offset - self._position, 1 << 20)):
            pass
        return self._position

    @override
    def readinto(self, buffer: Any) -> int:
        content = self._content(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def _content(self, size: int) -> bytes:
        while not self._stream.eof or self._begin_stream():
            compressed = b""
            if self._stream.needs_input:
                compressed, self._input = self._input or self._raw.read(READ_BYTES), b""
                if not compressed:
                    raise EOFError("the file ends within a stream")
            if content := self._stream.decompress(compressed, size):
                self._position += len(content)
                return bytes(content)
        return b""

    def _begin_stream(self) -> bool:
        """Begin the next stream; False at the end of the file."""
        rest, zeros = self._stream.unused_data, 0
        while not (next_stream := rest.lstrip(b"\0")):
            zeros += len(rest)
            if not (rest := self._raw.read(READ_BYTES)):
                break
        zeros += len(rest) - len(next_stream)
        if zeros % self._padding_multiple:
            raise OSError(f"{zeros} zeros follow a stream")
        self._stream, self._input = self._new_decompressor(), next_stream
        return bool(next_stream)
