"""Is this file a GGUF file? Every length in it held against the file's size before anything reads by it.

The one idea: the gguf package believes what a header says, and a hundred bytes can say that 2^60 entries follow. A walk
over the header, which reads no tensor, is enough to know that the package can be let loose on it.
"""

import mmap
import struct
from pathlib import Path

from limbeck.errors import LimbeckError

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_MAX_DIMENSIONS = 4
_STRING, _ARRAY = 8, 9
#: Bytes of the value types that have a fixed size, by number.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


class _Walk:
    """A place in the file that only moves forward, and never beyond its end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path, self._data, self._at = path, data, 0

    def fail(self, reason: str) -> LimbeckError:
        return LimbeckError(f"{self._path} is no GGUF file that can be read (byte {self._at}: {reason}).")

    def skip(self, size: int) -> None:
        if size > len(self._data) - self._at:
            raise self.fail(f"{size} bytes are announced and {len(self._data) - self._at} are left")
        self._at += size

    def take(self, size: int) -> bytes:
        self.skip(size)
        return self._data[self._at - size : self._at]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def text(self) -> None:
        part = self.take(self.number(8))
        try:
            part.decode()
        except UnicodeDecodeError as error:
            raise self.fail(f"text that is no UTF-8: {error.reason}") from None

    def value(self, kind: int, depth: int = 0) -> None:
        if kind == _STRING:
            self.text()
        elif kind == _ARRAY and depth < 4:
            inner, count = self.number(4), self.number(8)
            if inner in _SIZES:
                self.skip(count * _SIZES[inner])
                return
            if count > len(self._data) - self._at:  # an entry has a byte at least
                raise self.fail(f"an array of {count} entries in a file of {len(self._data)} bytes")
            for _ in range(count):
                self.value(inner, depth + 1)
        elif kind in _SIZES:
            self.skip(_SIZES[kind])
        else:
            raise self.fail(f"a value of the unknown type {kind}")

    def tensor(self) -> None:
        self.text()
        dimensions = self.number(4)
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise self.fail(f"a tensor of {dimensions} dimensions")
        total = 1
        for _ in range(dimensions):
            total *= self.number(8)
        if total > 8 * 4 * len(self._data):  # no type has less than a quarter of a bit a weight
            raise self.fail(f"a tensor of {total} weights in a file of {len(self._data)} bytes")
        self.number(4)
        if self.number(8) > len(self._data):
            raise self.fail("a tensor that begins behind the end of the file")


def check_gguf(path: Path) -> None:
    """Refuse a file whose header can not be true.

    Raises:
        LimbeckError: says where and why.
    """
    with path.open("rb") as file:
        if path.stat().st_size < 24:
            raise LimbeckError(f"{path} is no GGUF file that can be read ({path.stat().st_size} bytes).")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _walk(_Walk(path, data), len(data))


def _walk(walk: _Walk, size: int) -> None:
    if walk.take(4) != _MAGIC:
        raise walk.fail("it does not begin with GGUF")
    version, tensors, values = struct.unpack("<IQQ", walk.take(20))
    if version not in _VERSIONS:
        raise walk.fail(f"version {version}, and this limbeck reads {' and '.join(map(str, _VERSIONS))}")
    if tensors + values > size:
        raise walk.fail(f"{tensors} tensors and {values} values in a file of {size} bytes")
    for _ in range(values):
        walk.text()
        walk.value(walk.number(4))
    for _ in range(tensors):
        walk.tensor()
