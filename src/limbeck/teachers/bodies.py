"""Bodies of requests and answers. Compressed answers are undone a bounded part at a time: nineteen kilobytes of zstd
can stand for six hundred megabytes.

The one idea: the decoder is never allowed to give more than what is left of the limit.
"""

import json
import sys
import zlib
from functools import partial
from typing import Any

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

__all__ = ["ACCEPTED", "BodyReader", "DamagedError", "TooLargeError", "encode_body", "zstd"]

_SLACK = 1 << 16

#: What answers may be compressed with, as `Accept-Encoding` says it.
ACCEPTED = "zstd, gzip"


class TooLargeError(Exception):
    """The body is larger than allowed."""


class DamagedError(Exception):
    """The body does not decompress, or is cut short."""


class BodyReader:
    """Collects a body that may be compressed.

    Args:
        encoding: the answer's `Content-Encoding`.
        limit: bytes that the body may have once it is decompressed.

    Raises:
        DamagedError: an encoding that was not accepted.
    """

    def __init__(self, encoding: str, limit: int) -> None:
        self._limit, self._came, self.content = limit, 0, bytearray()
        self._decoder: Any = None
        self._new: Any = None
        if encoding in ("gzip", "x-gzip"):
            self._new = partial(zlib.decompressobj, 16 + zlib.MAX_WBITS)
        elif encoding == "zstd":
            self._new = zstd.ZstdDecompressor
        elif encoding not in ("", "identity"):
            raise DamagedError(f"an answer in the encoding {encoding[:40]!r}, where {ACCEPTED} were asked for")

    def feed(self, data: bytes) -> None:
        """Add bytes as they came.

        Raises:
            TooLargeError, DamagedError: see the classes.
        """
        self._came += len(data)
        if self._came > 2 * self._limit + _SLACK:  # frames without content have no end
            raise TooLargeError
        if self._new is None:
            self._add(data)
            return
        try:
            while data:  # a body may be several gzip members or zstd frames, one after the other
                if self._decoder is None or self._decoder.eof:
                    self._decoder = self._new()
                self._add(self._decoder.decompress(data, self._room))
                while self._has_more():
                    rest = getattr(self._decoder, "unconsumed_tail", b"")
                    self._add(self._decoder.decompress(rest, self._room))
                data = self._decoder.unused_data
        except (zlib.error, zstd.ZstdError, EOFError) as error:
            raise DamagedError(f"the answer does not decompress ({error})") from None

    def finish(self) -> bytes:
        """The whole body."""
        if self._new is not None and (self._decoder is None or not self._decoder.eof):
            raise DamagedError("the compressed answer is cut short")
        return bytes(self.content)

    @property
    def _room(self) -> int:
        return self._limit + 1 - len(self.content)

    def _has_more(self) -> bool:
        if self._decoder.eof:
            return False
        return bool(getattr(self._decoder, "unconsumed_tail", b"")) or not getattr(self._decoder, "needs_input", True)

    def _add(self, data: bytes) -> None:
        self.content += data
        if len(self.content) > self._limit:
            raise TooLargeError


def encode_body(body: dict[str, Any]) -> bytes:
    """A request's JSON as it is sent."""
    return json.dumps(body, separators=(",", ":")).encode()
