"""What the kernels compute, in NumPy: the definition that the C++ ones are held against, and their stand-in.

Source: the GGUF block types (docs/formats.md); int8 activations a token as in BitNet b1.58 (arXiv 2402.17764).
Shapes: M matrices, R rows, C columns, T tokens, B blocks of a row.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Blocks:
    """A block type: columns and bytes of a block, what a code is above its weight, and the largest code."""

    columns: int
    bytes: int
    offset: int
    most: int
    scale_first: bool


BLOCKS = {
    "q4_0": Blocks(32, 18, 8, 15, True),
    "q8_0": Blocks(32, 34, 128, 255, True),
    "tq1_0": Blocks(256, 54, 1, 2, False),
    "tq2_0": Blocks(256, 66, 1, 2, False),
    "q2_0": Blocks(64, 18, 1, 3, True),
}
_TQ1_PARTS = ((32, 5), (16, 5), (4, 4))  # bytes, and digits of base 3 in each


def level() -> str:
    """The instructions in use."""
    return "numpy"


def _blocks(name: str) -> Blocks:
    if name not in BLOCKS:
        raise ValueError(f"block type '{name}' is not known; there are {', '.join(BLOCKS)}.")
    return BLOCKS[name]


def pack_blocks(name: str, codes: Array, scales: Array) -> Array:
    """Weights' codes `[R, C]` (signed) and float16 scales as bits `[R, B]`, as a file's blocks `[R, bytes]`.

    Raises:
        ValueError: rows are no multiple of the block, or a code is none of the type's.
    """
    kind = _blocks(name)
    rows, columns = codes.shape
    if columns % kind.columns:
        raise ValueError(f"rows of {columns} are no multiple of {name}'s block of {kind.columns}.")
    if scales.shape != (rows, columns // kind.columns):
        raise ValueError(
            f"scales are {list(scales.shape)} and the codes have {[rows, columns // kind.columns]} blocks."
        )
    least, largest = int(codes.min()), int(codes.max())
    if least + kind.offset < 0 or largest + kind.offset > kind.most:
        wrong = largest if largest + kind.offset > kind.most else least
        raise ValueError(f"a code is {wrong} and {name} holds {-kind.offset} to {kind.most - kind.offset}.")
    fields = np.add(codes, kind.offset, dtype=np.int16).astype(np.uint8).reshape(rows, -1, kind.columns)
    if name == "q4_0":
        packed = fields[..., :16] | (fields[..., 16:] << 4)
    elif name == "q8_0":
        packed = fields ^ 0x80
    elif name == "q2_0":
        packed = np.bitwise_or.reduce(fields.reshape(rows, -1, 16, 4) << np.array([0, 2, 4, 6], np.uint8), axis=-1)
    elif name == "tq2_0":
        planes = fields.reshape(rows, -1, 2, 4, 32) << np.array([0, 2, 4, 6], np.uint8)[:, None]
        packed = np.bitwise_or.reduce(planes, axis=-2).reshape(rows, -1, 64)
    else:
        packed = _pack_base3(fields)
    halves = scales.astype("<u2")[..., None].view(np.uint8)
    parts = [halves, packed] if kind.scale_first else [packed, halves]
    return np.concatenate(parts, axis=-1).reshape(rows, -1)


def _pack_base3(fields: Array) -> Array:
    parts, start = [], 0
    for count, digits in _TQ1_PARTS:
        held = fields[..., start : start + count * digits].reshape(*fields.shape[:-1], digits, count).astype(np.int32)
        number = np.zeros(held[..., 0, :].shape, np.int32)
        for digit in range(5):
            number = 3 * number + (held[..., digit, :] if digit < digits else 0)
        parts.append(((number * 256 + 242) // 243).astype(np.uint8))
        start += count * digits
    return np.concatenate(parts, axis=-1)


def split(name: str, blocks: Array) -> tuple[Array, Array]:
    """Codes int32 `[..., B, columns]` (signed) and scales float32 `[..., B]` of a file's blocks `[..., bytes]`."""
    kind = _blocks(name)
    if blocks.shape[-1] % kind.bytes:
        raise ValueError(f"rows of {blocks.shape[-1]} bytes are no multiple of {name}'s block of {kind.bytes}.")
    cells = blocks.reshape(*blocks.shape[:-1], -1, kind.bytes)
    halves, data = (cells[..., :2], cells[..., 2:]) if kind.scale_first else (cells[..., -2:], cells[..., :-2])
    scales = np.ascontiguousarray(halves).view("<f2")[..., 0].astype(np.float32)
    shifts = np.array([0, 2, 4, 6], np.uint8)
    if name == "q4_0":
        codes = np.concatenate([data & 15, data >> 4], axis=-1)
    elif name == "q8_0":
        codes = data ^ 0x80
    elif name == "q2_0":
        codes = ((data[..., None] >> shifts) & 3).reshape(*data.shape[:-1], 64)
    elif name == "tq2_0":
        planes = (data.reshape(*data.shape[:-1], 2, 1, 32) >> shifts[:, None]) & 3
        codes = planes.reshape(*data.shape[:-1], 256)
    else:
        codes = _split_base3(data)
    return codes.astype(np.int32) - kind.offset, scales


def _split_base3(data: Array) -> Array:
    parts, start = [], 0
    for count, digits in _TQ1_PARTS:
        rest = data[..., start : start + count].astype(np.int32)
        for _ in range(digits):
            parts.append((3 * rest) >> 8)
            rest = (3 * rest) & 255
        start += count
    return np.concatenate(parts, axis=-1)


def unpack_blocks(name: str, blocks: Array) -> Array:
    """Weights float32 `[R, C]` of a file's blocks `[R, bytes]`."""
    codes, scales = split(name, blocks)
    weights: Array = codes.astype(np.float32) * scales[..., None]
    return weights.reshape(*blocks.shape[:-1], -1)


def quantise_activations(x: Array, block: int, whole_row: bool) -> tuple[Array, Array, Array]:
    """int8 codes of activations `[T, C]`, their scales and the sums of codes `[T, B]`.

    Args:
        x: float32.
        block: columns that share a sum.
        whole_row: one scale for a token (repeated for its blocks); else one for each block.
    """
    rows, columns = x.shape
    padded = np.pad(x, ((0, 0), (0, -columns % block))).reshape(rows, -1, block)
    most = np.abs(padded).max(axis=-1)
    if whole_row:
        most = np.broadcast_to(most.max(axis=-1, keepdims=True), most.shape)
    scales = np.maximum(most, np.float32(1e-5)) / np.float32(127.0)
    codes = np.rint(padded * (np.float32(1.0) / scales)[..., None]).astype(np.int32)
    sums = codes.sum(axis=-1, dtype=np.int32)
    return codes.reshape(rows, -1)[:, :columns].astype(np.int8), np.ascontiguousarray(scales, np.float32), sums


class Pool:
    """Has the native pool's name; NumPy uses the threads of its own libraries.

    Args:
        threads, pin, numa_aware: as of the native pool; without effect.
    """

    def __init__(self, threads: int = 0, pin: bool = False, numa_aware: bool = False) -> None:
        self.threads = 1


class Weights:
    """Matrices of a file's blocks `[M, R, bytes]`.

    Args:
        name: of a block type.
        blocks: uint8.
        pool: not used.
    """

    def __init__(self, name: str, blocks: Array, pool: Pool) -> None:
        self._codes, self._scales = split(name, blocks)
        self._whole_rows = name in ("tq1_0", "tq2_0", "q2_0") or (name == "q4_0" and self._has_ternary_groups())

    def _has_ternary_groups(self) -> bool:
        """Codes of -1, 0 and 1 with scales of 64 columns at least: ternary weights in another type."""
        paired = self._scales.shape[-1] % 2 == 0 and np.array_equal(self._scales[..., ::2], self._scales[..., 1::2])
        return paired and int(np.abs(self._codes).max()) <= 1

    @property
    def shape(self) -> tuple[int, int, int]:
        """(M, R, C)."""
        matrices, rows, blocks, columns = self._codes.shape
        return matrices, rows, blocks * columns

    def row(self, matrix: int, row: int) -> Array:
        """One row as float32 `[C]`."""
        weights: Array = self._codes[matrix, row].astype(np.float32) * self._scales[matrix, row][:, None]
        return weights.reshape(-1)

    def _product(self, matrix: int, x: Array) -> Array:
        """`[T, C]` by one matrix: activations with one scale a token (ternary) or a block (others)."""
        held, columns = self._codes[matrix], self._codes.shape[-1]
        codes, scales, _ = quantise_activations(x, columns, self._whole_rows)
        grouped = codes.reshape(len(x), -1, columns).astype(np.float32)
        whole = np.einsum("tbc,rbc->trb", grouped, held.astype(np.float32))
        result: Array = np.einsum("trb,rb,tb->tr", whole, self._scales[matrix], scales)
        return result.astype(np.float32)

    def multiply(self, x: Array, pool: Pool) -> Array:
        """`[T, C]` to `[T, R]` by the first matrix."""
        self._check(x)
        return self._product(0, x)

    def multiply_experts(self, x: Array, experts: Array, pool: Pool) -> Array:
        """`[T, C]` to `[T, K, R]` by the matrices `[T, K]` that each token chose."""
        self._check(x)
        wrong = experts[(experts < 0) | (experts >= self.shape[0])]
        if len(wrong):
            raise ValueError(f"expert {wrong[0]} was chosen and there are {self.shape[0]}.")
        out = np.zeros((*experts.shape, self.shape[1]), np.float32)
        for expert in np.unique(experts):
            tokens, places = np.nonzero(experts == expert)
            out[tokens, places] = self._product(int(expert), x[tokens])
        return out

    def _check(self, x: Array) -> None:
        if x.shape[1] != self.shape[2]:
            raise ValueError(f"activations have {x.shape[1]} columns and the weights {self.shape[2]}.")
