"""The tokenizer, where the recipe trains one."""

from collections.abc import Sequence
from typing import Any

from limbeck.config import Recipe
from limbeck.data.sources import open_source
from limbeck.data.tokenizer import train_tokenizer
from limbeck.folders import StageFolder
from limbeck.manifests import TokenizerManifest
from limbeck.registry import STAGES
from limbeck.stages.base import Stage


@STAGES.register("tokenizer")
class TokenizerStage(Stage):
    """A byte-level BPE of the training documents."""

    @classmethod
    def of(cls, recipe: Recipe, before: Sequence[Stage]) -> list[Stage]:
        """One, where `tokenizer.train_vocab_size` is set."""
        wanted = recipe.tokenizer.train_vocab_size is not None
        return [cls(recipe, "tokenizer", recipe.root / "tokenizer")] if wanted else []

    def inputs(self) -> dict[str, Any]:
        """The text, and how much of it."""
        dataset = self.recipe.dataset
        return {
            "source": open_source(dataset).identity(),
            "vocab_size": self.recipe.tokenizer.train_vocab_size,
            "text_column": dataset.text_column,
            "max_samples": dataset.max_samples,
            "validation_fraction": dataset.validation_fraction,
        }

    def make(self, folder: StageFolder, *, force: bool) -> None:
        """Train it."""
        folder.begin(replace=force)
        size = self.recipe.tokenizer.train_vocab_size
        assert size is not None  # else there is no such stage
        trained = train_tokenizer(self.recipe.dataset, size, folder.path)
        TokenizerManifest(fingerprint=folder.fingerprint, hash=trained.hash).write(folder.path)
