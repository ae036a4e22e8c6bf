"""Packed rows: of the recipe, and of those of its training's stages that have a dataset of their own."""

from collections.abc import Sequence
from typing import Any

from limbeck.config import Recipe
from limbeck.console import warn
from limbeck.data.pack import pack, pack_inputs
from limbeck.data.sources import open_source
from limbeck.data.tokenizer import recipe_tokenizer
from limbeck.errors import LimbeckError
from limbeck.folders import StageFolder
from limbeck.manifests import PackedManifest
from limbeck.registry import STAGES
from limbeck.stages.base import Stage


@STAGES.register("pack")
class PackStage(Stage):
    """Text to rows of tokens."""

    command = "data pack"

    @classmethod
    def of(cls, recipe: Recipe, before: Sequence[Stage]) -> list[Stage]:
        """The recipe's own rows, and those that its training reads; with the same rows they share them."""
        found: dict[str, Stage] = {}
        for own in [recipe, *recipe.training_recipes()]:
            name = f"pack{own.data_name}"
            named = own.dataset.packed_dir
            after = [stage.name for stage in before]
            found.setdefault(name, cls(own, name, own.packed_dir, after=after, named=named))
        return list(found.values())

    def inputs(self) -> dict[str, Any]:
        """The text, the tokenizer and the shape of the rows."""
        return pack_inputs(self.recipe.dataset, open_source(self.recipe.dataset), recipe_tokenizer(self.recipe))

    def needs(self) -> str:
        """The text and the shape of the rows."""
        section = self.recipe.dataset
        return f"{section.name} to rows of {section.max_length} tokens of {self._whose()}"

    def _whose(self) -> str:
        trained = self.recipe.tokenizer.train_vocab_size
        return f"a tokenizer of {trained} ids" if trained is not None else self.recipe.tokenizer_source.name

    def make(self, folder: StageFolder, *, force: bool) -> PackedManifest:
        """Pack."""
        return pack(self.recipe.dataset, recipe_tokenizer(self.recipe), folder, force=force)

    def made(self, later: Sequence[Stage]) -> None:
        """Tell before the training, not after it, that nothing is left to score on."""
        recipe = self.recipe
        if not later or recipe.data_name or recipe.dataset.validation_fraction == 0.0:
            return
        manifest = PackedManifest.read(self.path)
        if not manifest.splits["validation"].rows:
            message = (
                f"no row of the {manifest.documents} documents is held out (dataset.validation_fraction "
                f"{recipe.dataset.validation_fraction}): there is one row of {manifest.max_length} tokens. Lower "
                "dataset.max_length, or give more text"
            )
            if any(stage.scores_held_out for stage in later):
                raise LimbeckError(f"{message}.")
            warn(message)
