"""The sizes of a RetNet-HRM, and which of its parts it has.

Shapes: D width, H heads, n layers of a stack, M segments.
"""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

#: Keys that are at least 1.
_COUNTS = (
    "hidden_size", "vocab_size", "num_attention_heads", "num_hidden_layers", "value_expansion", "H_cycles", "segments",
    "chunk_size", "memory_heads", "memory_chunk",
)  # fmt: skip


@strict
class RetNetHRMConfig(PreTrainedConfig):
    """Configuration of `RetNetHRMForCausalLM`.

    Attributes:
        hidden_size: D.
        intermediate_size: width of the SwiGLU between its two products.
        num_hidden_layers: layers with weights of their own: n with `L_cycles` 0, else n in each of two stacks.
        num_attention_heads: H retention heads; keys are D/H wide, values `value_expansion` times that.
        value_expansion: width of all values over D.
        chunk_size: positions that are multiplied with one another at once; what is before comes by the state.
        H_cycles: applications of the H stack in a segment.
        L_cycles: applications of the L stack before each of them; 0: there is none, and with `H_cycles` 1 the model is
            a plain RetNet.
        L_bp_cycles: of the L stack's applications before the h-th of the H stack, how many of the last ones carry a
            gradient; the last number holds for what follows it.
        segments: M repetitions of all cycles; each one is trained on, and starts from the states of the one before.
        halting: a head says after each segment, token by token, whether another one is needed.
        memory: a Titans memory is read and written at the last application of the H stack.
        memory_heads: matrices that the memory consists of.
        memory_chunk: tokens between two of its updates.
        embedding_scale: what embeddings are multiplied by; default √D. HRM's own 1/0.02 learns more slowly
            (docs/log.md).
    """

    model_type = "retnet_hrm"
    keys_to_ignore_at_inference = ("past_key_values",)

    vocab_size: int = 32000
    hidden_size: int = 1280
    intermediate_size: int = 3456
    num_hidden_layers: int = 12
    num_attention_heads: int = 10
    value_expansion: int = 2
    chunk_size: int = 128
    H_cycles: int = 1
    L_cycles: int = 0
    L_bp_cycles: list[int] | tuple[int, ...] = (1, 2)
    segments: int = 1
    halting: bool = False
    memory: bool = False
    memory_heads: int = 4
    memory_chunk: int = 64
    embedding_scale: float | None = None
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        self.L_bp_cycles = list(self.L_bp_cycles)
        if self.embedding_scale is None:
            self.embedding_scale = float(self.hidden_size**0.5)
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Part of `@strict`: sizes that belong together.

        Raises:
            ValueError: names the two that do not.
        """
        for name in _COUNTS:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it is at least 1")
        if self.hidden_size % self.num_attention_heads or self.hidden_size // self.num_attention_heads % 2:
            raise ValueError(
                f"hidden_size is {self.hidden_size} and num_attention_heads {self.num_attention_heads}; each head "
                "needs the same even number of key dimensions"
            )
        if self.L_cycles and self.num_hidden_layers % 2:
            raise ValueError(
                f"num_hidden_layers is {self.num_hidden_layers} and L_cycles {self.L_cycles}; two stacks need an even "
                "number of layers"
            )
        if self.L_cycles < 0 or (self.L_cycles and (not self.L_bp_cycles or min(self.L_bp_cycles) < 1)):
            raise ValueError(
                f"L_cycles is {self.L_cycles} and L_bp_cycles {list(self.L_bp_cycles)}; the L stack is trained by at "
                "least one of its cycles"
            )
        if self.halting and self.segments < 2:
            raise ValueError(
                f"halting is true and segments is {self.segments}; only a segment that follows can be saved"
            )
        if self.memory and self.hidden_size % self.memory_heads:
            raise ValueError(f"hidden_size is {self.hidden_size}, which {self.memory_heads} memory_heads do not divide")

    @property
    def layers_per_stack(self) -> int:
        """n."""
        return self.num_hidden_layers // (2 if self.L_cycles else 1)

    @property
    def key_width(self) -> int:
        """Key dimensions of one head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def value_width(self) -> int:
        """Value dimensions of one head."""
        return self.key_width * self.value_expansion

    def trained_cycles(self, high: int) -> int:
        """L cycles that carry a gradient before the H stack's application number `high`."""
        return self.L_bp_cycles[min(high, len(self.L_bp_cycles) - 1)]
