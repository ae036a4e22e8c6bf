"""The student in other programs' formats."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from limbeck.config import Recipe
from limbeck.folders import StageFolder
from limbeck.manifests import ExportManifest, StudentManifest
from limbeck.plugins import plugin_identity
from limbeck.registry import STAGES
from limbeck.stages.base import Stage
from limbeck.storage import read_json, write_json

_SIZES = ("checkpoint_mb", "packed_mb", "hf_mb", "gguf_mb", "type", "weights_equal")


@STAGES.register("export")
class ExportStage(Stage):
    """A student to files."""

    @classmethod
    def of(cls, recipe: Recipe, before: Sequence[Stage]) -> list[Stage]:
        """One, with formats in `pipeline.export`."""
        return [cls(recipe, "export", recipe.root / "export", after=["train"])] if recipe.pipeline.export else []

    def inputs(self) -> dict[str, Any]:
        """The student, the formats, and how they are written."""
        section = self.recipe.export
        return {
            "student": StudentManifest.read(self.recipe.student_dir).weights,
            "formats": self.recipe.pipeline.export,
            "plugins": plugin_identity(self.recipe.plugins),
            "settings": section.model_dump(mode="json", exclude={"input", "output", "verify_tokens"}),
        }

    def check(self) -> None:
        """Each format can hold the student, and the folder is the run's."""
        self.needs()  # which finds out
        StageFolder(self.path, self.command, {}).refuse_foreign_files()

    def needs(self) -> str:
        """The formats."""
        return ", ".join(self._formats)

    @cached_property
    def _formats(self) -> list[str]:
        """What is written; asked for twice by `--dry-run`."""
        from limbeck.export.check import check_export
        from limbeck.training.check import planned_student

        recipe = self.recipe
        student, tokenizer = planned_student(recipe)
        if student is None:
            return list(recipe.pipeline.export)
        return check_export(recipe.export, recipe.pipeline.export, student, tokenizer)

    def make(self, folder: StageFolder, *, force: bool) -> None:
        """Write each format and check it."""
        from limbeck.export.run import export_student

        folder.begin(replace=force)
        recipe, sizes = self.recipe, dict[str, Any]()
        for kind in recipe.pipeline.export:
            output = folder.path / (f"{recipe.name}.gguf" if kind == "gguf" else kind)
            section = recipe.export.model_copy(update={"output": output, "format": kind})
            sizes.update(export_student(section, recipe.student_dir, recipe.name, verify=True))
        write_json(folder.path / "sizes.json", {key: sizes[key] for key in _SIZES if key in sizes})
        ExportManifest(fingerprint=folder.fingerprint).write(folder.path)

    def read(self) -> dict[str, Any]:
        """`sizes`: megabytes of each form."""
        return {"sizes": read_json(self.path / "sizes.json")}

    def text(self, found: dict[str, Any]) -> str:
        """One line, from the checkpoint to the smallest."""
        sizes = found["sizes"]
        names = {
            "checkpoint_mb": "checkpoint",
            "packed_mb": "packed",
            "hf_mb": "hf",
            "gguf_mb": f"GGUF ({sizes.get('type')})",
        }
        steps = [f"{label} {sizes[key]:.2f} MB" for key, label in names.items() if key in sizes]
        return "student: " + " → ".join(steps)
