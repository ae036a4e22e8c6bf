"""The teacher's cached targets, where the training reads them from a cache."""

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from limbeck.config import Recipe
from limbeck.errors import LimbeckError
from limbeck.folders import StageFolder
from limbeck.manifests import CacheManifest, PackedManifest
from limbeck.registry import STAGES
from limbeck.stages.base import Stage, check_source

if TYPE_CHECKING:
    from limbeck.data.dataset import PackedDataset


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
        """The teacher, the rows, and what is kept of its predictions; of a cache that answers for them, its own."""
        from limbeck.teachers.reuse import answering

        if brought := self._brought():
            return brought
        wanted, rows = self._wanted, self._rows
        own = StageFolder(self.path, self.command, wanted, self.backup)
        if own.is_kept() or own.recorded() == own.fingerprint:  # finished, or begun for this recipe alone
            return wanted
        earlier = sorted(self.backup.glob(f"{self.path.name}-*")) if self.backup is not None else []
        # The folder itself once more: another rank may just have put an earlier one there.
        for folder in (self.path, *earlier, self.path):
            held = answering(folder, wanted, rows)
            if held is not None and StageFolder(self.path, self.command, held, self.backup).is_kept():
                return held
        return wanted

    def anew(self) -> StageFolder:
        """What is made again is made for this recipe alone, whatever a wider cache answered."""
        if not self._brought():
            self.folder = StageFolder(self.path, self.command, self._wanted, self.backup)
        return self.folder

    @cached_property
    def _wanted(self) -> dict[str, Any]:
        """What a cache for this recipe alone is made from."""
        from limbeck.teachers.build_cache import cache_inputs

        return cache_inputs(self.recipe)

    @cached_property
    def _rows(self) -> "PackedDataset":
        """All training rows there are."""
        from limbeck.data.dataset import PackedDataset

        return PackedDataset(self.recipe.packed_dir)

    def replaces(self, folder: StageFolder) -> str:
        """What the cache that is there lacks, and what another one costs.

        Raises:
            LimbeckError: it lies in a folder that the user named, and is kept.
        """
        from limbeck.teachers.reuse import cost, lacks

        try:
            held = CacheManifest.read(self.path)
        except LimbeckError:  # unfinished, or damaged
            held = None
        made_from = folder.recorded_inputs()
        missing = lacks(made_from, self._wanted, self._rows) if made_from else []
        splits = PackedManifest.read(self.recipe.packed_dir).splits
        count = sum(splits[split].rows for split in self._wanted["splits"] if split != "train")
        if "train" in self._wanted["splits"]:
            count += min(self._wanted["train_rows"] or len(self._rows), len(self._rows))
        price = cost(self._wanted, held, count, self.recipe.dataset.max_length)
        why = "; ".join(missing) or folder.differences()
        if self.backup is None:
            raise LimbeckError(
                f"the cache {self.path} does not answer this run: {why}. Making one for it: {price}. Name another "
                "folder (--cache-dir), or change the run to what the cache has; `limbeck teacher cache --force` "
                "deletes it for another."
            )
        return f"the cache there does not answer this run: {why}. Another one is made: {price}"

    def hint(self) -> str | None:
        """Where another run keeps targets that would do."""
        from limbeck.teachers.reuse import answering

        others = (path for path in sorted(self.recipe.root.parent.glob("*/cache")) if path != self.path)
        found = next((path for path in others if answering(path, self._wanted, self._rows) is not None), None)
        return None if found is None else f"{found} holds these targets: with --cache-dir {found} no teacher has to run"

    def _brought(self) -> dict[str, Any]:
        """What a cache from elsewhere was made from, where there is one and its teacher is not at hand."""
        if self.recipe.teacher.model is not None or self.recipe.teacher.is_remote:
            return {}
        return StageFolder(self.path, self.command, {}).recorded_inputs()

    def make(self, folder: StageFolder, *, force: bool) -> CacheManifest | None:
        """Run the teacher over the rows."""
        from limbeck.teachers.build_cache import build_cache

        return build_cache(self.recipe, folder, force=force)

    def needs(self) -> str:
        """The teacher, and what is kept of it."""
        section = self.recipe.teacher
        who = [*section.remote.endpoint, str(section.model)]
        kept = "the whole vocabulary" if section.top_k is None else f"{section.top_k} ids a position"
        return f"one pass of {who[0]} over the rows; {kept}, temperatures {list(self.recipe.temperatures)}"

    def check(self) -> None:
        """The teacher can be had."""
        from limbeck.teachers.sources import producing_source

        if not self._brought():
            check_source(self.recipe, producing_source(self.recipe))
