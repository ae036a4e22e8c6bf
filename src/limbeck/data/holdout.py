"""Which text is held out of training: whole documents, or single rows where documents are too few.

The one idea: a document belongs to a split by a hash of its name, the same everywhere; only when that would leave one
of the two splits without any document is every k-th row held out instead.
"""

import hashlib
import math
from dataclasses import dataclass
from itertools import islice

import numpy as np

from limbeck.config import DatasetConfig
from limbeck.data.sources import Source

_LOOKED_AT = 1000  # documents; of so many one is held out at any fraction worth setting


def held_out(key: str, fraction: float) -> bool:
    """True when the document belongs to the validation split: a hash of its key, the same everywhere."""
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


@dataclass(frozen=True)
class Holdout:
    """How a dataset is divided.

    Attributes:
        fraction: share that is held out.
        by_row: rows are held out, not documents.
    """

    fraction: float
    by_row: bool = False

    @classmethod
    def of(cls, config: DatasetConfig, source: Source) -> "Holdout":
        """By document, unless the source has so few that one split would have none."""
        fraction = config.validation_fraction
        if not 0.0 < fraction < 1.0:
            return cls(fraction)
        most = min(config.max_samples or _LOOKED_AT, _LOOKED_AT)
        seen: set[bool] = set()
        count = 0
        for document in islice(source.documents(), most):
            count += 1
            seen.add(held_out(document.key, fraction))
            if len(seen) == 2:
                return cls(fraction)
        return cls(fraction, by_row=count < _LOOKED_AT)

    def of_document(self, key: str) -> bool:
        """True when the whole document is held out."""
        return not self.by_row and held_out(key, self.fraction)

    def of_rows(self, first: int, count: int, *, is_last: bool) -> np.ndarray:
        """`[count]` bool: which of the rows from number `first` on are held out.

        Args:
            first: rows before these.
            count: rows.
            is_last: no more follow; the last one is then held out if none was before, but for a single row.
        """
        ends = np.floor((np.arange(first, first + count + 1)) * self.fraction + 0.5)
        chosen: np.ndarray = np.diff(ends) > 0
        if is_last and first + count > 1 and math.floor((first + count) * self.fraction + 0.5) == 0:
            chosen[-1] = True
        return chosen
