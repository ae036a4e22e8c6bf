"""OLMo 2: norms behind attention and feed-forward layers, and over the whole width of queries and keys."""

from collections.abc import Sequence

from limbeck.export.architectures.base import Architecture, Target
from limbeck.registry import ARCHITECTURES


@ARCHITECTURES.register("olmo2")
class Olmo2(Architecture):
    """OLMo 2."""

    name = "olmo2"
    heads_fill_width = True

    def targets(self, name: str) -> Sequence[Target]:
        """llama.cpp wants a head of its own, so a tied embedding is written twice."""
        found = super().targets(name)
        if self.config.tie_word_embeddings and name == "model.embed_tokens.weight":
            return [*found, Target(f"{self.lookup('lm_head')}.weight")]
        return found
