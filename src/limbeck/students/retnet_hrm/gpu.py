"""flash-linear-attention's retention kernel, where it is installed and the tensors are on a GPU.

The one idea: it is looked for when the first row on a GPU comes, never before: merely importing it where there is no
GPU breaks the linear attention of other models.
"""

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch


@cache
def _kernel() -> Any:
    if find_spec("fla") is None:
        return None
    from fla.ops.retention import chunk_retention as kernel

    return kernel


def kernel_serves(hidden: torch.Tensor) -> bool:
    """True when rows like these can go through the kernel: on a GPU, in float32 or narrower, with it installed."""
    return hidden.is_cuda and hidden.dtype != torch.float64 and _kernel() is not None


def chunk_retention(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, borders: torch.Tensor
) -> torch.Tensor:
    """`retention.retention` of rows without padding and without a carried state, by the kernel.

    Args:
        queries, keys: `[B, T, H, K]`, rotated; keys divided by √K.
        values: `[B, T, H, V]`.
        borders: `[documents + 1]` where documents begin in the rows laid end to end.

    Returns:
        `[B, T, H, V]`.
    """
    flat = (part.flatten(0, 1).unsqueeze(0).contiguous() for part in (queries, keys, values))
    found: torch.Tensor = _kernel()(*flat, scale=1.0, cu_seqlens=borders)[0]
    return found.reshape(values.shape)
