"""Gemma 3: norms around 0, sliding windows with a RoPE of their own, a scale of attention that is not the head's."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from limbeck.errors import LimbeckError
from limbeck.export.architectures.base import Architecture, Target
from limbeck.registry import ARCHITECTURES


@ARCHITECTURES.register("gemma3_text")
class Gemma3(Architecture):
    """Gemma 3's text models."""

    name = "gemma3"
    fixed: ClassVar[Mapping[str, Any]] = {
        "attention_bias": False,
        "hidden_activation": "gelu_pytorch_tanh",
        "attn_logit_softcapping": None,
        "use_bidirectional_attention": False,
    }

    def check(self) -> None:
        """RoPE is linear at most: where layers slide, llama.cpp scales nothing and shares what YaRN needs."""
        super().check()
        config = self.config
        kinds = {"full": self.rope.get("rope_type", "default")}
        if self._slides:
            kinds["sliding"] = config.rope_parameters["sliding_attention"].get("rope_type", "default")
        if kinds["full"] == "yarn" or kinds.get("sliding", "default") != "default":
            raise LimbeckError(
                f"RoPE is of type {kinds}; llama.cpp's gemma3 has default and linear for layers that attend to "
                "everything, and default for those that slide. Change rope_parameters in the student."
            )

    def check_window(self) -> None:
        """Layers may slide, with a window that is given."""
        if self._slides and not self.config.sliding_window:
            raise LimbeckError(
                f"sliding_window is {self.config.sliding_window} and layer_types has sliding_attention. Give the "
                "student a sliding_window, or layer_types of full_attention."
            )

    def targets(self, name: str) -> Sequence[Target]:
        """Norms are stored around 0 here and around 1 there; the queries' takes in the scale of attention."""
        found = super().targets(name)
        if name.endswith("norm.weight"):
            scale = self._query_scale if name.endswith("q_norm.weight") else 1.0
            return [Target(target.name, change=lambda t: (t.float() + 1.0) * scale) for target in found]
        return found

    def add_numbers(self, writer: Any) -> None:
        """Which layers slide, how far they see, their RoPE, and the bound of logits."""
        super().add_numbers(writer)
        config = self.config
        if self._slides:
            writer.add_sliding_window(config.sliding_window)
            writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
            writer.add_rope_freq_base_swa(float(config.rope_parameters["sliding_attention"]["rope_theta"]))
        if config.final_logit_softcapping is not None:
            writer.add_final_logit_softcapping(float(config.final_logit_softcapping))

    @property
    def rope(self) -> dict[str, Any]:
        """The rotation of layers that attend to everything."""
        found: dict[str, Any] = self.config.rope_parameters["full_attention"]
        return found

    @property
    def _slides(self) -> bool:
        return "sliding_attention" in self.config.layer_types

    @property
    def _query_scale(self) -> float:
        """What queries are multiplied by, so that llama.cpp's own scale of attention becomes the config's."""
        config = self.config
        # Of 62 layers llama.cpp knows the 27B model, whose scale is not by the heads' width.
        theirs = config.hidden_size // config.num_attention_heads if config.num_hidden_layers == 62 else self.head_width
        return float((theirs / config.query_pre_attn_scalar) ** 0.5)
