"""From logits to a token: temperature, the k likeliest, the nucleus; one seeded stream of random numbers a text.

Shapes: V vocabulary.
"""

from dataclasses import dataclass
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
    """

    temperature: float = 0.7
    top_k: int = 40
    top_p: float = 1.0
    seed: int = 0

    def distribution(self, logits: Array) -> Array:
        """The probabilities `[V]`, float64, that tokens are drawn with."""
        if self.temperature <= 0.0:
            certain = np.zeros(len(logits))
            certain[int(np.argmax(logits))] = 1.0
            return certain
        scaled = logits.astype(np.float64) / self.temperature
        if 0 < self.top_k < len(scaled):
            least = np.partition(scaled, -self.top_k)[-self.top_k]
            scaled = np.where(scaled < least, -np.inf, scaled)
        probabilities = np.exp(scaled - scaled.max())
        probabilities /= probabilities.sum()
        if self.top_p < 1.0:
            order = np.argsort(-probabilities, kind="stable")
            kept = int(np.searchsorted(np.cumsum(probabilities[order]), self.top_p)) + 1
            probabilities[order[kept:]] = 0.0
            probabilities /= probabilities.sum()
        found: Array = probabilities
        return found


def draw(probabilities: Array, rng: np.random.Generator) -> int:
    """A token of a distribution `[V]`."""
    sums = np.cumsum(probabilities)
    place = min(rng.random() * sums[-1], np.nextafter(sums[-1], 0.0))  # never at the very end, where nothing may lie
    return int(np.searchsorted(sums, place, side="right"))
