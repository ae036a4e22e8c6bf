"""What decoding carries from token to token: states whose size does not depend on how many there were.

The one idea: every application of a layer has a slot of its own, because the stacks are applied several times to each
token and each application sees another text; a slot holds tensors whose first dimension is the row.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import Cache

Slot = tuple[int, ...]


class RecurrentCache(Cache):
    """States by slot; what `generate` hands from step to step.

    Attributes:
        states: tensors by slot, `[B, …]` each.
        seen: tokens so far, padding included.
    """

    is_compileable = False

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.states: dict[Slot, dict[str, torch.Tensor]] = {}
        self.seen = 0

    def get(self, slot: Slot) -> dict[str, torch.Tensor]:
        """The tensors of a slot; none before the first token."""
        return self.states.get(slot, {})

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens so far."""
        return self.seen

    def nbytes(self) -> int:
        """Memory of all states."""
        return sum(tensor.nbytes for slot in self.states.values() for tensor in slot.values())

    def reset(self) -> None:
        """Forget everything."""
        self.states, self.seen = {}, 0

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Rows `beam_idx` of every state, for beam search."""
        self._map(lambda state: state.index_select(0, beam_idx.to(state.device)))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`."""
        self._map(lambda state: state[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        self._map(lambda state: state.repeat_interleave(repeats, dim=0))

    def crop(self, max_length: int) -> Any:
        """Refused: a state cannot be taken back.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("a recurrent state cannot be cropped; generate without an assistant model.")

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.states = {
            slot: {name: change(state) for name, state in held.items()} for slot, held in self.states.items()
        }
