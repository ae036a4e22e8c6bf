"""Whole next-token distributions, for scores that must not depend on which ids were stored."""

from typing import Protocol

import torch


class Reference(Protocol):
    """Whole next-token distributions of the N = B·T positions of some rows."""

    def log_probs(self, positions: torch.Tensor) -> torch.Tensor:
        """Log-probabilities `[n, V]` in float32 at the given flat positions."""
