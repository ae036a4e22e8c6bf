"""The teacher's cached targets, where the training reads them from a cache."""

from collections.abc import Sequence
from typing import Any

from limbeck.config import Recipe
from limbeck.folders import StageFolder
from limbeck.manifests import CacheManifest
from limbeck.registry import STAGES
from limbeck.stages.base import Stage


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
                found.setdefault(name, cls(own, name, own.cache_dir, after=after, named=own.teacher.cache_dir))
        return list(found.values())

    def inputs(self) -> dict[str, Any]:
        """The teacher, the rows, and what is kept of its predictions."""
        from limbeck.teachers.build_cache import cache_inputs

        gone = self.recipe.teacher.model is None and not self.recipe.teacher.is_remote
        if gone:  # a cache brought from elsewhere, without its teacher
            recorded = StageFolder(self.path, self.command, {}).recorded_inputs()
            if recorded:
                return recorded
        return cache_inputs(self.recipe)

    def make(self, folder: StageFolder, *, force: bool) -> CacheManifest | None:
        """Run the teacher over the rows."""
        from limbeck.teachers.build_cache import build_cache

        return build_cache(self.recipe, folder, force=force)

    def check(self) -> None:
        """The endpoint is there."""
        from limbeck.teachers.choose import check_endpoint

        check_endpoint(self.recipe)
