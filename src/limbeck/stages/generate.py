"""What the trained students, and their teacher, make of one prompt."""

from collections.abc import Sequence
from typing import Any

from limbeck.config import ModelSource, Recipe
from limbeck.folders import StageFolder
from limbeck.manifests import SampleManifest, StudentManifest
from limbeck.models import model_identity
from limbeck.registry import STAGES
from limbeck.stages.base import Stage
from limbeck.stages.train import TrainStage
from limbeck.storage import atomic_write_text, read_json, write_json

_SAMPLES = "samples.json"


@STAGES.register("generate")
class GenerateStage(Stage):
    """Students to texts, and the teacher's beside them.

    Args:
        students: what was trained.
    """

    def __init__(self, recipe: Recipe, students: Sequence[TrainStage]) -> None:
        super().__init__(recipe, "generate", recipe.root / "sample", after=[student.name for student in students])
        self.students = {student.label: student.path for student in students}

    @classmethod
    def of(cls, recipe: Recipe, before: Sequence[Stage]) -> list[Stage]:
        """One, with `pipeline.generate`."""
        if not recipe.pipeline.generate:
            return []
        return [cls(recipe, [stage for stage in before if isinstance(stage, TrainStage)])]

    @property
    def _teacher(self) -> ModelSource | None:
        """The teacher's model, where it is in this process."""
        teacher = self.recipe.teacher
        return None if teacher.is_remote or not self.recipe.distils else teacher.source

    def inputs(self) -> dict[str, Any]:
        """The models and how they are sampled."""
        teacher = self._teacher
        return {
            "students": {name: StudentManifest.read(path).weights for name, path in self.students.items()},
            "teacher": None if teacher is None else model_identity(teacher.name, teacher.revision),
            "generation": self.recipe.generation.model_dump(mode="json"),
        }

    def make(self, folder: StageFolder, *, force: bool) -> None:
        """Write."""
        from limbeck.evaluation.generate import write_sample

        recipe = self.recipe
        folder.begin(replace=force)
        section, device, local = recipe.generation, recipe.training.device, recipe.teacher.local
        samples = {}
        if self._teacher is not None:
            samples["teacher"] = write_sample(section, self._teacher, local.device or device, local.dtype)
        for name, path in self.students.items():
            samples[name] = write_sample(section, ModelSource(str(path / "final")), device)
        write_json(folder.path / _SAMPLES, samples)
        atomic_write_text(folder.path / "sample.txt", samples[next(iter(self.students))])
        SampleManifest(fingerprint=folder.fingerprint).write(folder.path)

    def read(self) -> dict[str, Any]:
        """`samples`: the texts by model; `sample`: the student's own."""
        held = read_json(self.path / _SAMPLES)
        samples = {name: held[name] for name in ("teacher", *self.students) if name in held}
        return {"samples": samples, "sample": samples[next(iter(self.students))]}

    def text(self, found: dict[str, Any]) -> str:
        """The texts side by side."""
        from limbeck.console import columns

        titles = {name.replace("_", " "): text for name, text in found["samples"].items()}
        return f"one prompt, continued:\n{columns(titles)}"
