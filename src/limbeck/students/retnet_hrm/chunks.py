"""Chunks of a memory: which one each token of a batch of rows belongs to.

The one idea: chunks are counted from where their document begins, so neither padding nor what else is in a row changes
which tokens share one.

Shapes: B rows, T positions, C tokens of a chunk, N chunks of a row.
"""

from dataclasses import dataclass

import torch

from limbeck.students.retnet_hrm.retention import Places

Tensor = torch.Tensor


@dataclass(frozen=True)
class ChunkLayout:
    """Which chunk each token of a batch of rows belongs to.

    Attributes:
        index: `[B, T]` chunk · C + place in it; N·C for padding.
        chunks: N; chunk 0 goes on with what is carried.
        begins: `[B, N]` the chunk has its first token here.
        fresh: `[B, N]` and it is a document's first.
        full: `[B, N]` the chunk has its last token here.
    """

    index: Tensor
    chunks: int
    begins: Tensor
    fresh: Tensor
    full: Tensor

    @classmethod
    def of(cls, places: Places, rows: int, size: int) -> "ChunkLayout":
        """The layout for chunks of `size` tokens."""
        positions = places.positions.expand(rows, -1)
        used = torch.ones_like(positions, dtype=torch.bool) if places.used is None else places.used
        place, length = positions % size, positions.shape[1]
        chunk = ((place == 0) & used).long().cumsum(-1)
        # How many there are is known beforehand but for rows of several documents, whose chunks may be short.
        most = -(-length // size) + 1
        count = most if places.documents is None or length == 1 else int(chunk.max()) + 1

        def chunks_with(tokens: Tensor) -> Tensor:
            return (
                torch.zeros(rows, count, dtype=torch.long, device=chunk.device).scatter_add(
                    1, chunk, (tokens & used).long()
                )
                > 0
            )

        index = torch.where(used, chunk * size + place, count * size)
        return cls(index, count, chunks_with(place == 0), chunks_with(positions == 0), chunks_with(place == size - 1))
