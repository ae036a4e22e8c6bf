"""Elias–Fano coding of sorted ids: within half a bit an id of the entropy of K random ids of V.

The one idea: of an id the l = ⌊log2(V / K)⌋ low bits are stored plain, the high part in unary (a one for each id,
a zero for each step), so every position has the same size and decoding is a few NumPy calls over whole blocks.

Shapes: N positions, K ids, V vocabulary. Sections, all uint8: `low` [N, K·⌊l/8⌋] whole bytes of the low bits; `bits`
[N, (l mod 8)·⌈K/8⌉] the other low bits as planes; `high` [N, H] the unary parts.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from limbeck.errors import CorruptError

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class IdLayout:
    """Sizes of the sections for K ids below V."""

    top_k: int
    vocab_size: int

    @property
    def low_bits(self) -> int:
        """l = ⌊log2(V / K)⌋, the optimum of Elias–Fano."""
        return max(0, math.floor(math.log2(self.vocab_size / self.top_k)))

    @property
    def high_bits(self) -> int:
        """Length of the unary part: a one for each id, a zero for each step of the high part."""
        return self.top_k + ((self.vocab_size - 1) >> self.low_bits) + 1

    @property
    def widths(self) -> dict[str, int]:
        """Bytes a position of each section."""
        return {
            "low": self.low_bits // 8 * self.top_k,
            "bits": self.low_bits % 8 * -(-self.top_k // 8),
            "high": -(-self.high_bits // 8),
        }


def encode_ids(ids: Array, layout: IdLayout) -> dict[str, Array]:
    """Sections of ids `[N, K]` uint32, ascending in each row (equal ids are allowed)."""
    count, low = len(ids), layout.low_bits
    whole = [((ids >> (8 * i)) & 0xFF).astype(np.uint8) for i in range(low // 8)]
    planes = [
        np.packbits(((ids >> bit) & 1).astype(np.uint8), axis=1, bitorder="little") for bit in range(low // 8 * 8, low)
    ]
    unary = np.zeros((count, layout.widths["high"] * 8), dtype=np.uint8)
    places = (ids >> low) + np.arange(layout.top_k, dtype=np.uint32)
    np.put_along_axis(unary, places.astype(np.int64), 1, axis=1)
    empty = np.zeros((count, 0), dtype=np.uint8)
    return {
        "low": np.concatenate([empty, *whole], axis=1),
        "bits": np.concatenate([empty, *planes], axis=1),
        "high": np.packbits(unary, axis=1, bitorder="little"),
    }


def decode_ids(sections: dict[str, Array], layout: IdLayout, out: Array) -> None:
    """Fill `out` [N, K] int32 with the ids of the sections.

    Raises:
        CorruptError: the unary parts do not hold K ids each.
    """
    count, low, top_k = len(out), layout.low_bits, layout.top_k
    unary = np.unpackbits(sections["high"], axis=1, bitorder="little", count=layout.high_bits)
    ones = np.flatnonzero(unary)
    if len(ones) != count * top_k:
        raise CorruptError("coded ids do not decode: their unary part has the wrong number of ones.")
    row_starts = np.arange(count, dtype=np.int64) * layout.high_bits
    out[:] = ones.reshape(count, top_k) - row_starts[:, None] - np.arange(top_k)
    out <<= low
    for index in range(low // 8):
        out |= sections["low"][:, index * top_k : (index + 1) * top_k].astype(np.int32) << (8 * index)
    width = -(-top_k // 8)
    for index, bit in enumerate(range(low // 8 * 8, low)):
        plane = sections["bits"][:, index * width : (index + 1) * width]
        out |= np.unpackbits(plane, axis=1, bitorder="little", count=top_k).astype(np.int32) << bit
