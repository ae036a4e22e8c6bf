"""The teacher's cached targets, where the training reads them from a cache."""

from collections.abc import Sequence
from typing import Any

from limbeck.config import Recipe
from limbeck.folders import StageFolder
from limbeck.manifests import CacheManifest
from limbeck.registry import STAGES
from limbeck.stages.base import Stage, check_source


@STAGES.register("cache")
class CacheStage(Stage):
    """Rows to targets."""

    command = "teacher cache"
    shared = True

    @classmethod
    def of(cls, recipe: Recipe, before: Sequence[Stage]) -> list[Stage]:
        """One for each folder of rows that is distilled from a cache."""
        found: dict[str, Stage] = {}
        for own in recipe.training_recipes():
            if own.distils and own.teacher.reads_cache:
                name, after = f"cache{own.data_name}", [f"pack{own.data_name}"]
                found.setdefault(name, cls(own, name, own.cache_dir, after=after, named=own.teacher.cache.dir))
        return list(found.values())

    def inputs(self) -> dict[str, Any]:
        """The teacher, the rows, and what is kept of its predictions."""
        from limbeck.teachers.build_cache import cache_inputs

        return self._brought() or cache_inputs(self.recipe)

    def _brought(self) -> dict[str, Any]:
        """What a cache from elsewhere was made from, where there is one and its teacher is not at hand."""
        if self.recipe.teacher.model is not None or self.recipe.teacher.is_remote:
            return {}
        return StageFolder(self.path, self.command, {}).recorded_inputs()

    def make(self, folder: StageFolder, *, force: bool) -> CacheManifest | None:
        """Run the teacher over the rows."""
        from limbeck.teachers.build_cache import build_cache

        return build_cache(self.recipe, folder, force=force)

    def check(self) -> None:
        """The teacher can be had."""
        from limbeck.teachers.sources import producing_source

        if not self._brought():
            check_source(self.recipe, producing_source(self.recipe))
