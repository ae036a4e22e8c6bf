"""Students of our own in GGUF: `limbeck-…` architectures, which limbeck's engine runs and others refuse by name.

`limbeck-mhc-BASE` and `limbeck-compressed-BASE` are BASE's file with more tensors; `limbeck-retnet-hrm` has names of
its own. What an architecture of llama.cpp cannot express in BASE, it cannot here either.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

from limbeck.errors import LimbeckError
from limbeck.export.architectures.base import Architecture, Target
from limbeck.export.architectures.llama import Llama, Mistral, SmolLM3
from limbeck.export.architectures.qwen3 import Qwen2, Qwen3, Qwen3MoE
from limbeck.export.architectures.qwen3_next import Qwen3Next
from limbeck.registration import COMPRESSED_PREFIX, MHC_PREFIX
from limbeck.registry import ARCHITECTURES

OWN = "limbeck-"


class _Streamed(Architecture):
    """Mixed in before a base: residual streams and the connections between them."""

    def targets(self, name: str) -> Sequence[Target]:
        """Connections keep their names."""
        parts = name.split(".")
        if len(parts) == 5 and parts[3] in ("mhc_attention", "mhc_mlp"):
            return [Target(f"blk.{parts[2]}.{parts[3]}.{parts[4]}")]
        return super().targets(name)

    def stays_float32(self, name: str, shape: Sequence[int]) -> bool:
        """Connections too."""
        return ".mhc_" in name or super().stays_float32(name, shape)

    def add_numbers(self, writer: Any) -> None:
        """The streams."""
        super().add_numbers(writer)
        writer.add_uint32(f"{self.name}.mhc.streams", self.config.mhc_streams)


class _Compressed(Architecture):
    """Mixed in before a base with experts: latent, shared-core, core-delta or fewer experts, layer by layer."""

    def targets(self, name: str) -> Sequence[Target]:
        """Encoder and decoder of latent experts, cores, and the factors around them."""
        stem, _, part = name.partition(".mlp.experts.")
        block = f"blk.{stem.rpartition('.')[2]}.ffn_"
        if part in ("encoder.weight", "decoder.weight"):
            return [Target(f"{block}latent_{'in' if part == 'encoder.weight' else 'out'}.weight")]
        if part.startswith("shared_core."):
            return [Target(f"{block}core_{part.split('.')[1].removesuffix('_proj')}.weight")]
        if part.startswith("wrapper."):
            return [Target(f"{block}{part.removeprefix('wrapper.').replace('_proj', '')}_exps.weight")]
        return super().targets(name)


def _register(prefix: str, mark: str, mixin: type[Architecture], bases: dict[str, type[Architecture]]) -> None:
    """A variant of each base, by the model_type of transformers."""
    for model_type, base in bases.items():
        body = {"name": f"{OWN}{mark}-{base.name}", "names_of": base.name, "__doc__": f"{base.__doc__} With {mark}."}
        kind = type(f"{mixin.__name__}{base.__name__}", (mixin, base), body)
        ARCHITECTURES.register(prefix + model_type)(kind)


_register(
    MHC_PREFIX,
    "mhc",
    _Streamed,
    {"llama": Llama, "mistral": Mistral, "qwen2": Qwen2, "qwen3": Qwen3, "qwen3_moe": Qwen3MoE, "smollm3": SmolLM3},
)
_register(COMPRESSED_PREFIX, "compressed", _Compressed, {"qwen3_moe": Qwen3MoE, "qwen3_next": Qwen3Next})


@ARCHITECTURES.register("retnet_hrm")
class RetNetHRM(Architecture):
    """Retention layers in two stacks that take turns."""

    name = f"{OWN}retnet-hrm"
    _PARTS: ClassVar[dict[str, str]] = {
        "retention_norm": "retention_norm",
        "mlp_norm": "ffn_norm",
        **{f"retention.{part}_proj": f"retention_{part}" for part in "qkvgo"},
        **{f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
    }

    def check(self) -> None:
        """No halting and no memory: the engine has neither."""
        for key in ("halting", "memory"):
            if getattr(self.config, key):
                raise LimbeckError(f"{key} is true, and limbeck's engine runs RetNet-HRM without it. Train without it.")

    def lookup(self, key: str) -> str:
        """`high.0.retention_q` of `model.high.layers.0.retention.q_proj`."""
        if key in ("model.embed_tokens", "lm_head"):
            return "token_embd" if key != "lm_head" else "output"
        stack, _, rest = key.removeprefix("model.").partition(".")
        if rest == "norm":
            return f"{stack}.norm"
        _, number, part = rest.split(".", 2)
        return f"{stack}.{number}.{self._PARTS[part]}"

    def add_numbers(self, writer: Any) -> None:
        """Widths and cycles."""
        config = self.config
        writer.add_block_count(config.layers_per_stack)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_vocab_size(config.vocab_size)
        writer.add_embedding_scale(float(config.embedding_scale))
        numbers = {
            "retention.value_expansion": config.value_expansion,
            "hrm.high_cycles": config.H_cycles,
            "hrm.low_cycles": config.L_cycles,
            "hrm.segments": config.segments,
        }
        for key, value in numbers.items():
            writer.add_uint32(f"{self.name}.{key}", value)
