"""The student, and the baseline trained with cross-entropy alone."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from limbeck.config import Recipe
from limbeck.errors import ConfigError
from limbeck.folders import StageFolder
from limbeck.manifests import StudentManifest
from limbeck.models import choose_device, require_context
from limbeck.registry import STAGES
from limbeck.stages.base import Stage, check_source


@STAGES.register("train")
class TrainStage(Stage):
    """Rows and targets to a student.

    Args:
        label: how the table of scores calls it.
    """

    command = "train"
    shared = True

    def __init__(self, recipe: Recipe, name: str, path: Path, *, label: str, after: Sequence[str] = ()) -> None:
        # A changed mode with resume_from goes on in the same folder, by the user's own word.
        named = recipe.training.output_dir or recipe.training.resume_from
        super().__init__(recipe, name, path, after=after, named=named)
        self.label = label

    @classmethod
    def of(cls, recipe: Recipe, before: Sequence[Stage]) -> list[Stage]:
        """The recipe's student, and with `pipeline.ce_baseline` the same one without its teacher."""
        after = [stage.name for stage in before]
        label = "student_kd" if recipe.distils else "student_ce"
        found: list[Stage] = [cls(recipe, "train", recipe.student_dir, label=label, after=after)]
        if recipe.pipeline.ce_baseline and recipe.distils:
            packed = [stage.name for stage in before if stage.command == "data pack"]
            folder = recipe.root / "student-ce"
            found.append(cls(recipe.without_teacher(), "train_ce", folder, label="student_ce", after=packed))
        return found

    @property
    def keeps_recipe(self) -> bool:
        """True for the student itself, whose recipe is the run's."""
        return self.name == "train"

    @property
    def again(self) -> bool:
        """True when it is to go on from a checkpoint that is named."""
        return self.recipe.training.resume_from is not None and self.path == self.recipe.student_dir

    def inputs(self) -> dict[str, Any]:
        """Everything the trained weights depend on."""
        from limbeck.training.phases import run_inputs

        return run_inputs(self.recipe)

    def make(self, folder: StageFolder, *, force: bool) -> StudentManifest | None:
        """Train."""
        from limbeck.training.phases import train_recipe

        return train_recipe(self.recipe, folder, force=force)

    def check(self) -> None:
        """There is a student, its trackers are installed, and its teacher's endpoint is there."""
        from limbeck.teachers.sources import training_source

        recipe = self.recipe
        if not (recipe.student.model or recipe.student.config or recipe.student.builder):
            raise ConfigError(
                "no student: set student.model to pretrained weights or student.config to an architecture."
            )
        if recipe.training.fp16 and choose_device(recipe.training.device) == "cpu":
            raise ConfigError("training.fp16 is true and the device is a CPU, which has no float16. Use --bf16 auto.")
        if recipe.student.source is not None:
            require_context(recipe.student.source, recipe.dataset.max_length, "student")
        if recipe.distils and not recipe.teacher.reads_cache:
            check_source(recipe, training_source(recipe))
        for tracker in recipe.training.report_to:
            if find_spec(tracker) is None:
                raise ConfigError(
                    f"training.report_to names {tracker}, which is not installed. Install it "
                    f"(`pip install {tracker}`), or set report_to to []."
                )
