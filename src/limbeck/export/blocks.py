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
import torch

from limbeck.errors import LimbeckError
from limbeck.students.quantizer import pack_codes
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
    kind.name: kind
    for kind in (
        BlockType("tq2_0", 35, 256, 66),
        BlockType("tq1_0", 34, 256, 54),
        BlockType("q2_0", 42, 64, 18),
        BlockType("q4_0", 2, 32, 18),
    )
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
    codes = tensor.codes.reshape(*tensor.codes.shape[:-1], blocks, kind.columns)
    packed = _PACKERS[kind.name](codes)
    halves = scales.numpy().astype("<f2").view(np.uint8).reshape(*scales.shape, 2)
    parts = [packed, halves] if kind.name in ("tq2_0", "tq1_0") else [halves, packed]
    return np.concatenate(parts, axis=-1).reshape(*tensor.codes.shape[:-1], blocks * kind.bytes)


def _pack_tq2(codes: torch.Tensor) -> Array:
    fields = (codes + 1).to(torch.uint8).reshape(*codes.shape[:-1], 2, 4, 32).numpy()
    shifted = fields << np.array([0, 2, 4, 6], dtype=np.uint8).reshape(4, 1)
    whole: Array = np.bitwise_or.reduce(shifted, axis=-2)
    return whole.reshape(*codes.shape[:-1], 64)


def _pack_tq1(codes: torch.Tensor) -> Array:
    """gguf's own base-3 packing of −1, 0, 1 with scale 1; the scale's two bytes are left off."""
    from gguf import GGMLQuantizationType, quants

    flat = codes.reshape(-1, 256).numpy().astype(np.float32)
    return quants.quantize(flat, GGMLQuantizationType.TQ1_0)[:, :52].reshape(*codes.shape[:-1], 52)


def _pack_q2(codes: torch.Tensor) -> Array:
    packed: Array = pack_codes(codes).numpy()
    return packed


def _pack_q4(codes: torch.Tensor) -> Array:
    fields = (codes + 8).to(torch.uint8).numpy()
    packed: Array = fields[..., :16] | (fields[..., 16:] << 4)
    return packed


_PACKERS = {"tq2_0": _pack_tq2, "tq1_0": _pack_tq1, "q2_0": _pack_q2, "q4_0": _pack_q4}


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
