"""Llama and what is like it: llama.cpp rotates neighbouring pairs where transformers rotates halves."""

from collections.abc import Sequence
from typing import Any

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

    windows_by_layer = False


@ARCHITECTURES.register("smollm3")
class SmolLM3(Llama):
    """SmolLM 3, which rotates nothing in every fourth layer."""

    name = "smollm3"

    def check(self) -> None:
        """The layers without rotation are those that llama.cpp knows."""
        super().check()
        layers = self.config.num_hidden_layers
        found = [bool(rotates) for rotates in self.config.no_rope_layers[:layers]]
        if found != [number % 4 != 0 for number in range(1, layers + 1)]:
            raise LimbeckError(
                f"no_rope_layers is {self.config.no_rope_layers} and llama.cpp's smollm3 leaves RoPE out in every "
                "fourth layer. Leave no_rope_layers out of the student, with no_rope_layer_interval: 4."
            )


@ARCHITECTURES.register("granite")
class Granite(Llama):
    """Granite 3, dense: a Llama with four multipliers."""

    name = "granite"

    def add_numbers(self, writer: Any) -> None:
        """The multipliers; llama.cpp takes 0 for one that is not there."""
        super().add_numbers(writer)
        for key, add in (
            ("embedding_multiplier", writer.add_embedding_scale),
            ("residual_multiplier", writer.add_residual_scale),
            ("attention_multiplier", writer.add_attention_scale),
            ("logits_scaling", writer.add_logit_scale),
        ):
            value = float(getattr(self.config, key))
            if not value:
                raise LimbeckError(f"{key} is 0, which llama.cpp takes for none. Give another one in the student.")
            add(value)


def _interleaved(heads: int) -> Rows:
    """Rows of q or k from rotated halves (transformers) to rotated pairs (llama.cpp's llama)."""

    def rows(tensor: torch.Tensor) -> torch.Tensor:
        count, rest = tensor.shape[0], tensor.shape[1:]
        return tensor.reshape(heads, 2, count // heads // 2, *rest).transpose(1, 2).reshape(count, *rest)

    return rows
