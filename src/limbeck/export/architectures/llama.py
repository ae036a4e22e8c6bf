"""Llama and what is like it: llama.cpp rotates neighbouring pairs where transformers rotates halves."""

from collections.abc import Sequence

import torch

from limbeck.errors import LimbeckError
from limbeck.export.architectures.base import Architecture, Rows, Target
from limbeck.registry import ARCHITECTURES


@ARCHITECTURES.register("llama")
class Llama(Architecture):
    """Llama 2 and 3, SmolLM 2, TinyLlama …"""

    name = "llama"

    def targets(self, name: str) -> Sequence[Target]:
        """Rows of q and k are put in pairs."""
        found = super().targets(name)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            config = self.config
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            return [Target(target.name, _interleaved(heads)) for target in found]
        return found


@ARCHITECTURES.register("mistral")
class Mistral(Llama):
    """Mistral without a sliding window: llama.cpp runs it as a Llama."""

    def check(self) -> None:
        """Every position is attended to."""
        super().check()
        window = getattr(self.config, "sliding_window", None)
        if window is not None and window < self.config.max_position_embeddings:
            raise LimbeckError(
                f"sliding_window is {window} and the context {self.config.max_position_embeddings}; GGUF's llama "
                "attends to everything. Set sliding_window: null in the student."
            )


def _interleaved(heads: int) -> Rows:
    """Rows of q or k from rotated halves (transformers) to rotated pairs (llama.cpp's llama)."""

    def rows(tensor: torch.Tensor) -> torch.Tensor:
        count, rest = tensor.shape[0], tensor.shape[1:]
        return tensor.reshape(heads, 2, count // heads // 2, *rest).transpose(1, 2).reshape(count, *rest)

    return rows
