"""What every architecture is in GGUF: names, row order, changed values, numbers, and what cannot be expressed.

The one idea: an architecture is a few rules from a runtime name to GGUF tensors; every rearrangement is one of
rows, so that codes and scales of a ternary weight go through it alike and stay exact.

Shapes: H heads, D head width, R rows, C columns, E experts.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch

from limbeck.errors import LimbeckError
from limbeck.registry import ARCHITECTURES

Rows = Callable[[torch.Tensor], torch.Tensor]  # `[..., R, x]` to the rows of one GGUF tensor


@dataclass(frozen=True)
class Target:
    """One GGUF tensor made of a runtime tensor.

    Attributes:
        name: in the file.
        rows: picks and orders rows; works on values, codes and scales alike.
        change: changes values, for tensors that are never ternary.
    """

    name: str
    rows: Rows = lambda tensor: tensor
    change: Callable[[torch.Tensor], torch.Tensor] | None = None


class Architecture:
    """A model's architecture in GGUF; as it stands, that of a plain decoder with gated feed-forward layers.

    Args:
        config: the model's transformers config.

    Attributes:
        name: GGUF's name of it.
        names_of: the architecture whose tensor names it has; None: its own.
        fixed: settings that llama.cpp has in one value alone.
        heads_fill_width: whether llama.cpp wants the heads together to be as wide as the hidden states.
        windows_by_layer: whether the config names the layers that have a sliding window, or all have one.

    Raises:
        LimbeckError: GGUF cannot express a setting of the config.
    """

    name: ClassVar[str]
    names_of: ClassVar[str | None] = None
    fixed: ClassVar[Mapping[str, Any]] = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}
    heads_fill_width: ClassVar[bool] = False
    windows_by_layer: ClassVar[bool] = True

    def __init__(self, config: Any) -> None:
        self.config = config
        self.check()

    def check(self) -> None:
        """Refuse settings that the architecture does not have in GGUF."""
        config, rope = self.config, self.rope
        if rope.get("rope_type", "default") not in ("default", "linear", "yarn"):
            raise LimbeckError(
                f"RoPE of type {rope['rope_type']} can not be exported to GGUF; default, linear and yarn can."
            )
        factor = rope.get("partial_rotary_factor", 1.0)
        if rope.get("rope_type", "default") != "default" and self.rotated != int(self.head_width * factor):
            raise LimbeckError(
                f"partial_rotary_factor is {factor} and llama.cpp's {self.name} rotates whole heads. Set it to 1 in "
                "the student."
            )
        for key, only in self.fixed.items():
            found = getattr(config, key, only)
            if found is not None and found != only:
                raise LimbeckError(f"{key} is {found} and GGUF's {config.model_type} has {only}.")
        heads = config.num_attention_heads
        if self.heads_fill_width and heads * self.head_width != config.hidden_size:
            raise LimbeckError(
                f"{heads} heads of head_dim {self.head_width} are {heads * self.head_width} wide and hidden_size is "
                f"{config.hidden_size}; llama.cpp's {self.name} wants both equal. Leave head_dim out of the student."
            )
        self.check_window()

    def check_window(self) -> None:
        """Refuse a sliding window that is narrower than the context: most architectures attend to everything there."""
        config, window = self.config, getattr(self.config, "sliding_window", None)
        kinds = (getattr(config, "layer_types", None) or []) if self.windows_by_layer else ["sliding_attention"]
        context = config.max_position_embeddings
        if window is not None and window < context and "sliding_attention" in kinds:
            raise LimbeckError(
                f"sliding_window is {window} and the context {context}; llama.cpp's {self.name} attends to everything. "
                "Set sliding_window: null in the student."
            )

    def targets(self, name: str) -> Sequence[Target]:
        """The GGUF tensors that a runtime tensor becomes; none for one that the file does not need.

        Raises:
            LimbeckError: GGUF has no place for it.
        """
        if name == "lm_head.weight" and self.config.tie_word_embeddings:
            return []
        stem, _, suffix = name.rpartition(".")
        return [Target(f"{self.lookup(stem)}.{suffix}")]

    def stays_float32(self, name: str, shape: Sequence[int]) -> bool:
        """True for a tensor that is not ternary and is kept in float32: vectors, and whatever a subclass adds."""
        return len(shape) < 2

    def add_numbers(self, writer: Any) -> None:
        """Write the config's numbers into a `gguf.GGUFWriter`."""
        config = self.config
        writer.add_block_count(config.num_hidden_layers)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(self.head_width)
        writer.add_value_length(self.head_width)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_vocab_size(config.vocab_size)
        self._add_rope(writer)

    @property
    def rope(self) -> dict[str, Any]:
        """The settings of the rotation."""
        return getattr(self.config, "rope_parameters", None) or {}

    @property
    def rotated(self) -> int:
        """Dimensions of a head that are rotated."""
        return self.head_width

    @property
    def head_width(self) -> int:
        """Width of an attention head; not every config says it."""
        config = self.config
        return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)

    def lookup(self, key: str) -> str:
        """GGUF's name of a runtime module.

        Raises:
            LimbeckError: it has none.
        """
        found = self._names.get_name(key)
        if found is None:
            raise LimbeckError(f"GGUF has no tensor for {key}.")
        return str(found)

    @cached_property
    def _names(self) -> Any:
        """The gguf package's map of tensor names."""
        import gguf

        return gguf.get_tensor_name_map(
            getattr(gguf.MODEL_ARCH, (self.names_of or self.name).upper()), self.config.num_hidden_layers
        )

    def _add_rope(self, writer: Any) -> None:
        import gguf

        rope = self.rope
        writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
        writer.add_rope_dimension_count(self.rotated)
        kind = rope.get("rope_type", "default")
        if kind == "default":
            return
        if not rope.get("factor"):
            raise LimbeckError(f"rope_parameters has rope_type {kind} and no factor; GGUF needs it written out.")
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR if kind == "linear" else gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(rope["factor"]))
        if "original_max_position_embeddings" in rope:
            writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))
        if kind == "yarn":
            self._add_yarn(writer, rope)

    def _add_yarn(self, writer: Any, rope: dict[str, Any]) -> None:
        """YaRN's other settings; llama.cpp multiplies its own 1 + 0.1 ln(factor) by the file's attention factor.

        Of the borders between what is scaled and what is not it takes its own, whatever the file says.
        """
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        if not rope.get("truncate", True):
            raise LimbeckError("rope_parameters has truncate: false, for which GGUF has no key.")
        for key, only in (("beta_fast", 32.0), ("beta_slow", 1.0)):
            if (rope.get(key) or only) != only:
                raise LimbeckError(
                    f"rope_parameters has {key}: {rope[key]} and llama.cpp runs {self.name} with {only} whatever a "
                    "file says. Leave it out of the student."
                )
        _, attention = ROPE_INIT_FUNCTIONS["yarn"](self.config, "cpu")
        writer.add_rope_scaling_attn_factors(float(attention) / (1.0 + 0.1 * math.log(float(rope["factor"]))))
        writer.add_rope_scaling_yarn_beta_fast(32.0)
        writer.add_rope_scaling_yarn_beta_slow(1.0)


class PartlyRotated(Architecture):
    """An architecture that may rotate only the first dimensions of a head."""

    @property
    def rotated(self) -> int:
        """The share that `partial_rotary_factor` says."""
        width = self.head_width
        rotated = int(width * self.rope.get("partial_rotary_factor", 1.0))
        if rotated % 2:
            raise LimbeckError(
                f"partial_rotary_factor rotates {rotated} of {width} dimensions of a head, and llama.cpp rotates "
                "pairs. Choose a factor that gives an even number."
            )
        return rotated


class WithExperts(Architecture):
    """An architecture whose every layer has routed experts."""

    def check(self) -> None:
        """Experts in every layer, their weights normalised."""
        super().check()
        config = self.config
        if getattr(config, "mlp_only_layers", None) or getattr(config, "decoder_sparse_step", 1) != 1:
            raise LimbeckError("GGUF's architecture has experts in every layer; this student has dense layers between.")
        if not config.norm_topk_prob:
            raise LimbeckError(
                "llama.cpp normalises the chosen experts' weights; set norm_topk_prob: true in the student."
            )

    def targets(self, name: str) -> Sequence[Target]:
        """Gate and up projection lie one above the other here, and apart there."""
        if name.endswith("experts.gate_up_proj"):
            stem = name.removesuffix("gate_up_proj")
            half = self.config.moe_intermediate_size
            return [
                Target(f"{self.lookup(f'{stem}gate_proj')}.weight", lambda t: t[..., :half, :]),
                Target(f"{self.lookup(f'{stem}up_proj')}.weight", lambda t: t[..., half:, :]),
            ]
        if name.endswith("experts.down_proj"):
            return [Target(f"{self.lookup(name)}.weight")]
        return super().targets(name)

    def stays_float32(self, name: str, shape: Sequence[int]) -> bool:
        """Routers too."""
        return ".gate.weight" in name or super().stays_float32(name, shape)

    def add_numbers(self, writer: Any) -> None:
        """How many experts, how many are used, and their width."""
        super().add_numbers(writer)
        writer.add_expert_count(self.config.num_experts)
        writer.add_expert_used_count(self.config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(self.config.moe_intermediate_size)


def architecture(config: Any) -> Architecture:
    """The GGUF architecture of a transformers config.

    Raises:
        LimbeckError: stock llama.cpp has no architecture for it, or some setting of it is not known there.
    """
    if config.model_type not in ARCHITECTURES:
        raise LimbeckError(
            f"model_type {config.model_type} can not be exported to GGUF: the architectures are "
            f"{', '.join(ARCHITECTURES)}."
        )
    kind: type[Architecture] = ARCHITECTURES.get(config.model_type)
    return kind(config)
