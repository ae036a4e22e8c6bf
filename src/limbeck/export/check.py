"""Can the student be exported as the recipe says? Known from its outline, before anything is trained."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from limbeck.config.recipe import ExportConfig
from limbeck.data.tokenizer import LoadedTokenizer
from limbeck.errors import ConfigError, LimbeckError
from limbeck.export.gguf import GGUFLayout
from limbeck.export.run import require_group, require_precision
from limbeck.export.vocabulary import check_vocabulary


@dataclass(frozen=True)
class _OutlineShapes:
    """Names and shapes of a model on the meta device."""

    state: dict[str, Any]

    def names(self) -> Iterable[str]:
        return sorted(self.state)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.state[name].shape)


def check_export(
    section: ExportConfig, formats: Sequence[str], student: Any, tokenizer: LoadedTokenizer | None
) -> list[str]:
    """What `pipeline.export` will write, format by format.

    Args:
        section: how GGUF files are written.
        formats: what is asked for.
        student: on the meta device (`outline_of`), its ternary weights chosen.
        tokenizer: its own; None for one that the run trains.

    Raises:
        ConfigError: the student or its tokenizer cannot be held by a format; says by which key it was asked for.
    """
    found: list[str] = []
    ternary = getattr(student.config, "quantization_config", None) or {}
    for kind in formats:
        try:
            if kind == "packed" and not ternary:
                raise LimbeckError("the student has no ternary weights to pack. Set student.ternary.")
            if kind == "hf":
                require_precision(section.rest)
            require_group(section.group_size, ternary.get("group_size"))
            if kind != "gguf":
                found.append(kind)
                continue
            layout = GGUFLayout(student.config, ternary, section.type, section.embedding, "the student")
            found.append(f"gguf ({layout.architecture.name}, {layout.check(_OutlineShapes(student.state_dict()))})")
            if tokenizer is not None:  # one that is trained here is a byte-level BPE
                check_vocabulary(json.loads(tokenizer.json))
        except LimbeckError as error:
            raise ConfigError(f"pipeline.export has {kind}, which cannot be: {error}") from None
    return found
