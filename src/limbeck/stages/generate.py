"""A sample of what the student writes."""

from collections.abc import Sequence
from typing import Any

from limbeck.config import Recipe
from limbeck.folders import StageFolder
from limbeck.manifests import SampleManifest, StudentManifest
from limbeck.registry import STAGES
from limbeck.stages.base import Stage
from limbeck.storage import atomic_write_text


@STAGES.register("generate")
class GenerateStage(Stage):
    """A student to a text."""

    @classmethod
    def of(cls, recipe: Recipe, before: Sequence[Stage]) -> list[Stage]:
        """One, with `pipeline.generate`."""
        return [cls(recipe, "generate", recipe.root / "sample", after=["train"])] if recipe.pipeline.generate else []

    def inputs(self) -> dict[str, Any]:
        """The student and how it samples."""
        return {
            "student": StudentManifest.read(self.recipe.student_dir).weights,
            "generation": self.recipe.generation.model_dump(mode="json"),
        }

    def make(self, folder: StageFolder, *, force: bool) -> None:
        """Write."""
        from limbeck.evaluation.generate import write_sample

        recipe = self.recipe
        folder.begin(replace=force)
        text = write_sample(recipe.generation, str(recipe.student_dir / "final"), recipe.training.device)
        atomic_write_text(folder.path / "sample.txt", text)
        SampleManifest(fingerprint=folder.fingerprint).write(folder.path)

    def read(self) -> dict[str, Any]:
        """`sample`: the text."""
        return {"sample": (self.path / "sample.txt").read_text(encoding="utf-8")}

    def text(self, found: dict[str, Any]) -> str:
        """The text itself."""
        return f"sample:\n{found['sample']}"
