"""A model's output embedding: what is done to its logits, and the way around it without making all of them.

Shapes: B rows, T positions, D hidden width, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from limbeck.errors import LimbeckError


def embedded_vocab_size(model: Any) -> int:
    """Width of the model's logits."""
    return int(model.get_output_embeddings().weight.shape[0])


#: Spellings of a soft-cap in configs: Gemma, RecurrentGemma, xLSTM.
_SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to its head's output."""

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config: Any) -> "LogitTransform":
        """Read the transform from a transformers config (Gemma, Granite, Cohere, Falcon-H1, … spellings)."""
        scale = 1.0
        if getattr(config, "logits_scaling", None):
            scale /= float(config.logits_scaling)
        for key in ("logit_scale", "lm_head_multiplier"):
            if getattr(config, key, None):
                scale *= float(getattr(config, key))
        caps = (getattr(config, key, None) for key in _SOFT_CAPS)
        return cls(scale, next((float(cap) for cap in caps if cap), None))

    def __call__(self, logits: Any) -> Any:
        """Apply it to plain logits."""
        logits = logits if self.scale == 1.0 else logits * self.scale
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()


@contextmanager
def head_replaced(head: Any, forward: Callable[[Any], Any]) -> Iterator[None]:
    """Let the output embedding compute `forward(hidden)` instead of logits while the context lasts."""
    head.forward = forward
    try:
        yield
    finally:
        del head.forward


def verified_transform(model: Any) -> LogitTransform:
    """What the model does to its logits, checked by what it makes of logits up to ±60.

    Raises:
        LimbeckError: it has no linear output embedding, or does something that its config does not tell.
    """
    head = model.get_output_embeddings()
    if head is None or getattr(head, "weight", None) is None:
        raise LimbeckError(f"{type(model).__name__} has no output embedding (lm_head); it is no causal LM.")
    transform = LogitTransform.of(model.config.get_text_config())
    vocab, device = head.weight.shape[0], head.weight.device
    # A model's own logits may be so small that a soft-cap does not show.
    probe = torch.linspace(-60.0, 60.0, vocab, device=device).to(head.weight.dtype)
    training = model.training
    try:
        model.eval()
        ids = torch.arange(8, device=device).unsqueeze(0) % vocab
        with torch.no_grad(), head_replaced(head, lambda hidden: probe.expand(*hidden.shape[:-1], vocab)):
            logits = model(input_ids=ids, use_cache=False).logits
    finally:
        model.train(training)
    expected = transform(probe.float()).expand_as(logits)
    if not torch.allclose(logits.float(), expected, rtol=2e-2, atol=1e-2):
        raise LimbeckError(
            f"{type(model).__name__} changes its logits after lm_head in a way limbeck does not know "
            f"(scale {transform.scale}, soft-cap {transform.softcap} read from its config do not reproduce them)."
        )
    return transform


class OutputHead:
    """The way from a model's last hidden states to logits and log-probabilities, a few positions at a time.

    Args:
        model: a causal LM.
        vocab_size: ids from here on are padding of the embedding and get probability 0; None: all ids count.
    """

    def __init__(self, model: Any, vocab_size: int | None = None) -> None:
        self._head = model.get_output_embeddings()
        self._transform = LogitTransform.of(model.config.get_text_config())
        width = embedded_vocab_size(model)
        self.vocab_size = width if vocab_size is None else min(width, vocab_size)

    def logits(self, hidden: Any) -> Any:
        """Logits `[..., V]` in float32 of hidden states `[..., D]`."""
        logits = torch.nn.functional.linear(hidden, self._head.weight, getattr(self._head, "bias", None))
        return self._transform(logits[..., : self.vocab_size].float())

    def log_probs(self, hidden: Any) -> Any:
        """Log-probabilities `[..., V]` in float32."""
        return self.logits(hidden).log_softmax(dim=-1)

    def positions_in(self, size: int) -> int:
        """Positions whose float32 logits fit into `size` bytes; at least one."""
        return max(1, size // (4 * self.vocab_size))

    def walk(self, hidden: Any, positions: int) -> Iterator[tuple[slice, Any]]:
        """Logits of hidden states `[N, D]` chunk by chunk: where a chunk stands, and its logits `[n, V]`."""
        for start in range(0, len(hidden), positions):
            part = slice(start, min(start + positions, len(hidden)))
            yield part, self.logits(hidden[part])


def last_hidden_states(model: Any, **inputs: Any) -> Any:
    """What the model's output embedding is given `[B, T, D]`; no logits are made."""
    seen: list[Any] = []

    def keep(hidden: Any) -> Any:
        seen.append(hidden)
        return hidden[..., :1]

    with head_replaced(model.get_output_embeddings(), keep):
        model(**inputs)
    return seen[0]
