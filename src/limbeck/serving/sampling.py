"""From logits to a token: penalties, temperature, the k likeliest, the nucleus; random numbers of each text's own.

Shapes: V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_k: among this many; 0: all.
        top_p: among the fewest whose probabilities reach this; 1: all (Holtzman et al., arXiv 1904.09751).
        seed: of the random numbers.
        min_p: among those at least this share as likely as the likeliest (arXiv 2407.01082).
        repetition_penalty: divides the positive logits of tokens that stand in the text already, and multiplies their
            negative ones (CTRL, arXiv 1909.05858).
        presence_penalty, frequency_penalty: taken off the logits of tokens that were written, once, and for each time.
        logit_bias: id -> added to its logit.
    """

    temperature: float = 0.7
    top_k: int = 40
    top_p: float = 1.0
    seed: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def distribution(self, logits: Array, prompt: Sequence[int] = (), made: Sequence[int] = ()) -> Array:
        """The probabilities `[V]`, float64, that tokens are drawn with.

        Args:
            logits: the model's, `[V]`.
            prompt: ids before the text, which the repetition penalty counts.
            made: ids that were written, which all penalties count.
        """
        scores = self._adjusted(logits, prompt, made)
        if self.temperature <= 0.0:
            certain = np.zeros(len(scores))
            certain[int(np.argmax(scores))] = 1.0
            return certain
        if 0 < self.top_k < len(scores):  # the rest works on these alone
            best = np.argpartition(scores, -self.top_k)[-self.top_k :]
            found = np.zeros(len(scores))
            found[best] = self._chosen(scores[best])
            return found
        return self._chosen(scores)

    def _chosen(self, scores: Array) -> Array:
        scaled = scores / self.temperature
        probabilities: Array = np.exp(scaled - scaled.max())
        probabilities /= probabilities.sum()
        if self.min_p > 0.0:
            probabilities[probabilities < self.min_p * probabilities.max()] = 0.0
            probabilities /= probabilities.sum()
        if self.top_p < 1.0:
            order = np.argsort(-probabilities, kind="stable")
            kept = int(np.searchsorted(np.cumsum(probabilities[order]), self.top_p)) + 1
            probabilities[order[kept:]] = 0.0
            probabilities /= probabilities.sum()
        return probabilities

    def _adjusted(self, logits: Array, prompt: Sequence[int], made: Sequence[int]) -> Array:
        scores: Array = logits.astype(np.float64)
        if self.repetition_penalty != 1.0 and (prompt or made):
            seen = np.unique(np.array([*prompt, *made]))
            penalty = self.repetition_penalty
            scores[seen] = np.where(scores[seen] > 0.0, scores[seen] / penalty, scores[seen] * penalty)
        if made and (self.presence_penalty or self.frequency_penalty):
            written, counts = np.unique(np.array(made), return_counts=True)
            scores[written] -= self.presence_penalty + self.frequency_penalty * counts
        for token, bias in self.logit_bias.items():
            scores[token] += bias
        return scores


def draw(probabilities: Array, rng: np.random.Generator) -> int:
    """A token of a distribution `[V]`."""
    sums = np.cumsum(probabilities)
    place = min(rng.random() * sums[-1], np.nextafter(sums[-1], 0.0))  # never at the very end, where nothing may lie
    return int(np.searchsorted(sums, place, side="right"))
