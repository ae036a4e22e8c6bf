"""A GGUF file that is ready to run: the engine, the file's tokenizer, and sequences that give themselves back."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.config.engine import EngineConfig
from limbeck.errors import ConfigError, LimbeckError
from limbeck.kernels import native
from limbeck.serving.tokenizer import GgufTokenizer

Array = np.ndarray[Any, Any]


def is_gguf(path: Path | str | None) -> bool:
    """True for a file of that format, and for a file of that name, which is then refused with the reason.

    Raises:
        LimbeckError: the name ends in .gguf and there is no such file.
    """
    place = Path(path) if path is not None else None
    if place is None or not place.is_file():
        if place is not None and place.suffix == ".gguf":
            raise LimbeckError(f"{place} does not exist. Name a .gguf file.")
        return False
    with place.open("rb") as file:
        return file.read(4) == b"GGUF" or place.suffix == ".gguf"


class GgufModel:
    """A model on the engine.

    Args:
        path: a GGUF file.
        settings: threads, placement, cache.

    Attributes:
        engine: the C++ engine.
        path: the file.

    Raises:
        ConfigError: the kernels were not built.
        LimbeckError: the file is damaged, or of an architecture that does not run here.
    """

    def __init__(self, path: Path, settings: EngineConfig | None = None) -> None:
        settings = settings or EngineConfig()
        kernels = native()
        if kernels is None:
            raise ConfigError(
                f"{path} runs on limbeck's C++ engine, which was not built. Install a C++17 compiler and CMake and "
                "install limbeck again (`make kernels` in a checkout)."
            )
        self.path = Path(path)
        try:
            self.engine = kernels.Engine(
                str(path), settings.threads, settings.pin, settings.numa_aware, settings.cache, settings.batch_tokens
            )
        except ValueError as error:
            raise LimbeckError(str(error)) from error
        self._tokenizer: GgufTokenizer | None = None

    @property
    def tokenizer(self) -> GgufTokenizer:
        """The file's own."""
        if self._tokenizer is None:
            self._tokenizer = GgufTokenizer(self.engine.metadata(), str(self.path))
            if self._tokenizer.size != self.engine.vocabulary:
                raise LimbeckError(
                    f"{self.path} has {self._tokenizer.size} tokens and an embedding of {self.engine.vocabulary} rows."
                )
        return self._tokenizer

    def line(self) -> "Line":
        """A new sequence, empty."""
        return Line(self.engine, self.engine.create())


class Line:
    """A sequence of the engine: the tokens that it has read, and their cache or state, which go when it does."""

    def __init__(self, engine: Any, number: int) -> None:
        self.engine, self.number = engine, number

    def __del__(self) -> None:
        self.engine.drop(self.number)

    def __len__(self) -> int:
        return int(self.engine.length(self.number))

    def extend(self, ids: Sequence[int], every: bool = False) -> Array:
        """Go on with ids; logits `[V]` behind the last one, or with `every` `[len(ids), V]` behind each.

        Raises:
            LimbeckError: an id is not in the vocabulary, or the text would exceed the context.
        """
        try:
            logits: Array = self.engine.forward([(self.number, list(ids), every)])
        except ValueError as error:
            raise LimbeckError(str(error)) from error
        return logits if every else logits[0]

    def copy(self) -> "Line":
        """Another sequence that goes on from here."""
        return Line(self.engine, self.engine.fork(self.number))

    def bytes(self) -> int:
        """Memory of what it has read."""
        return int(self.engine.bytes(self.number))

    @property
    def can_cut(self) -> bool:
        """True where the model can forget the end of what it has read; a recurrence cannot."""
        return bool(self.engine.can_truncate)

    def cut(self, length: int) -> None:
        """Forget what stands behind `length`."""
        self.engine.truncate(self.number, length)
