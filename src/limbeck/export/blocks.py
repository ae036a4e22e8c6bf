"""Ternary codes and scales as GGUF blocks, to the bit: nothing is quantised again.

The one idea: a block type holds a ternary group exactly when its block divides the group; the group's float16
scale is then repeated in each of its blocks.

| type  | block | bytes | layout |
| tq2_0 | 256   | 66    | 64 B codes (2 halves × 4 planes of 32, code + 1 in bits 2n), float16 |
| tq1_0 | 256   | 54    | base 3, five codes a byte, float16 last |
| q2_0  | 64    | 18    | float16, then code + 1 of weight 4b + j in bits 2j |
| q4_0  | 32    | 18    | float16, then code + 8: weight j in the low nibble of byte j, j + 16 in the high |

Shapes: leading dimensions, R rows, C columns.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from limbeck.errors import LimbeckError
from limbeck.kernels.reference import BLOCKS, pack_blocks
from limbeck.students.ternary import TernaryTensor

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class BlockType:
    """A GGUF type that can hold ternary weights: its number, columns and bytes of a block."""

    name: str
    number: int
    columns: int
    bytes: int

    def fits(self, columns: int, group: int) -> str | None:
        """Why rows of `columns` in groups of `group` can not be held; None when they can."""
        if columns % self.columns:
            return f"its rows of {columns} are no multiple of {self.name}'s block of {self.columns}"
        if group % self.columns:
            return f"its groups of {group} are no multiple of {self.name}'s block of {self.columns}"
        return None


BLOCK_TYPES = {
    name: BlockType(name, number, BLOCKS[name].columns, BLOCKS[name].bytes)
    for name, number in (("tq2_0", 35), ("tq1_0", 34), ("q2_0", 42), ("q4_0", 2))
}


def encode_blocks(tensor: TernaryTensor, kind: BlockType) -> Array:
    """The tensor's blocks, uint8 `[..., R, C / columns · bytes]`.

    Raises:
        LimbeckError: rows or groups are no multiple of the block.
    """
    columns = tensor.codes.shape[-1]
    groups = tensor.scales.shape[-1]
    reason = kind.fits(columns, columns // groups)
    if reason is not None:
        raise LimbeckError(f"a weight can not be stored as {kind.name}: {reason}.")
    blocks = columns // kind.columns
    scales = tensor.scales.repeat_interleave(blocks // groups, dim=-1).contiguous()
    halves = scales.numpy().astype("<f2").view("<u2").reshape(-1, blocks)
    packed = pack_blocks(kind.name, tensor.codes.reshape(-1, columns).numpy(), halves)
    return packed.reshape(*tensor.codes.shape[:-1], blocks * kind.bytes)


def decode_blocks(data: Array, kind: BlockType, columns: int) -> Array:
    """Weights float32 `[..., C]` of stored blocks, by the gguf package's decoder (ours for q2_0, which it lacks)."""
    blocks = data.reshape(-1, kind.bytes)
    if kind.name == "q2_0":
        d = blocks[:, :2].copy().view("<f2").astype(np.float32)
        fields = (blocks[:, 2:, None] >> np.array([0, 2, 4, 6], dtype=np.uint8)) & 3
        weights: Array = (fields.reshape(len(blocks), 64).astype(np.float32) - 1.0) * d
    else:
        from gguf import GGMLQuantizationType, quants

        weights = quants.dequantize(blocks, GGMLQuantizationType(kind.number))
    return weights.reshape(*data.shape[:-1], columns)


def teach_gguf_q2() -> None:
    """Add Q2_0 to the gguf package's types when its version does not know it yet (0.19 does not)."""
    import gguf

    kinds: Any = gguf.GGMLQuantizationType
    kind = BLOCK_TYPES["q2_0"]
    if kind.number in kinds._value2member_map_:
        return
    member = int.__new__(kinds, kind.number)
    member._name_, member._value_ = "Q2_0", kind.number
    kinds._value2member_map_[kind.number] = kinds._member_map_["Q2_0"] = member
    kinds._member_names_.append("Q2_0")
    gguf.GGML_QUANT_SIZES[member] = (kind.columns, kind.bytes)
