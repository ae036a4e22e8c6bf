"""mHC-lite streams in training: is every mixing matrix doubly stochastic, and what do all of them do at once?

The one idea: a product of doubly stochastic matrices is one too, so what the layers do to the streams together neither
grows nor fades; both are looked at in every evaluation, on its first batch.

Shapes: N streams.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from limbeck.students.mhc.connection import connections
from limbeck.training.guard import DivergedError

_SLACK = 1e-5  # of a sum of float32 numbers; 3e-7 is what was seen


class StreamWatch:
    """Looks at the mixing of a model with streams; does nothing for any other.

    Args:
        model: the student.
    """

    def __init__(self, model: Any) -> None:
        self._connections = connections(model)
        self._seen: list[list[torch.Tensor]] = []

    @contextmanager
    def recording(self, wanted: bool = True) -> Iterator[None]:
        """Keep what the forwards inside mix with, where it is wanted."""
        if not wanted:
            yield
            return
        self._seen = [[] for _ in self._connections]
        for connection, seen in zip(self._connections, self._seen, strict=True):
            connection.recorded = seen
        try:
            yield
        finally:
            for connection in self._connections:
                connection.recorded = None

    def measure(self, prefix: str) -> dict[str, float]:
        """`mixing_error`, the furthest a row or column of any R is from 1, and `composite_gain`, the largest of ΠR.

        Raises:
            DivergedError: a matrix is not doubly stochastic.
        """
        every, self._seen = self._seen, []
        if not every:
            return {}
        error, whole = 0.0, None
        for mixings in every:
            mixing = torch.cat([part.cpu().double().reshape(-1, *part.shape[-2:]) for part in mixings])
            sums = torch.cat([mixing.sum(dim=-1), mixing.sum(dim=-2)])
            error = max(error, float((sums - 1.0).abs().max().nan_to_num(float("inf"))))
            whole = mixing if whole is None else mixing @ whole
        if not error <= _SLACK:
            raise DivergedError(
                f"a row or column of a mixing matrix of the student's streams differs from 1 by {error:g}: its logits "
                "are no numbers any more. Lower --mhc-lr, or start from an earlier checkpoint."
            )
        assert whole is not None
        gain = torch.cat([whole.abs().sum(dim=-1), whole.abs().sum(dim=-2)]).max()
        return {f"{prefix}_mixing_error": error, f"{prefix}_composite_gain": float(gain)}
