"""Compressed files, read to their last byte.

Inputs: a file, and the ending of its compression. Outputs: its content as a stream.

Design notes:
- A file may be several streams, one behind the other, as `cat a.xz b.xz` makes them. Behind a
  stream Python's `lzma` and `bz2` take what they do not know for the end: padding hides the streams
  that follow it, and damage the rest of the file. So decompressors of single streams read both.
- `zstd --long=31`, as published dumps have it, needs a window of 2 GB: it is allowed.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from collections.abc import Callable
from typing import Any, BinaryIO, cast

from backports import zstd

COMPRESSIONS: dict[str, Any] = {".gz": gzip, ".bz2": bz2, ".xz": lzma, ".zst": zstd}
"""Ending -> module."""

READ_BYTES = 1 << 16
XZ_PADDING = 4
"""Zeros between streams of .xz come in this multiple."""


def decompressed(raw: BinaryIO, compression: str) -> BinaryIO:
    """The content of a file.

    Args:
        raw: the file.
        compression: ending of its compression, or none.
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
    """The content of streams behind each other, with zeros between them.

    Args:
        raw: the file.
        make: a decompressor of one stream.
        multiple: number of zeros that may lie between streams.
    """

    def __init__(self, raw: BinaryIO, make: Callable[[], Any], multiple: int) -> None:
        self._raw, self._make, self._multiple = raw, make, multiple
        self._stream: Any = make()
        self._input = b""
        self._position = 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """Forwards, by reading."""
        return True

    def tell(self) -> int:
        """Bytes of content that are read."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Read on to an offset."""
        if whence != io.SEEK_SET or offset < self._position:
            raise io.UnsupportedOperation("only forwards, from the start")
        while self._position < offset and self._content(min(offset - self._position, 1 << 20)):
            pass
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Content, at most as long as the buffer; nothing at the end of the file."""
        content = self._content(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def _content(self, size: int) -> bytes:
        while not self._stream.eof or self._begin_stream():
            piece = b""
            if self._stream.needs_input:
                piece, self._input = self._input or self._raw.read(READ_BYTES), b""
                if not piece:
                    raise EOFError("the file ends within a stream")
            if content := self._stream.decompress(piece, size):
                self._position += len(content)
                return bytes(content)
        return b""

    def _begin_stream(self) -> bool:
        """Begin with the next stream; False at the end of the file."""
        rest, zeros = self._stream.unused_data, 0
        while not (next_stream := rest.lstrip(b"\0")):
            zeros += len(rest)
            if not (rest := self._raw.read(READ_BYTES)):
                break
        zeros += len(rest) - len(next_stream)
        if zeros % self._multiple:
            raise OSError(f"{zeros} zeros follow a stream")
        self._stream, self._input = self._make(), next_stream
        return bool(next_stream)
