"""The student, and the baseline trained with cross-entropy alone."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from limbeck.config import Recipe
from limbeck.errors import ConfigError
from limbeck.folders import StageFolder
from limbeck.manifests import StudentManifest
from limbeck.models import choose_device
from limbeck.registry import STAGES
from limbeck.stages.base import Stage, check_source
from limbeck.storage import fingerprint

_LENGTHS = ("max_steps", "num_train_epochs")


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
            needed = [stage.name for stage in before if stage.command != "teacher cache"]
            folder = recipe.root / "student-ce"
            found.append(cls(recipe.without_teacher(), "train_ce", folder, label="student_ce", after=needed))
        return found

    @property
    def model_folder(self) -> Path:
        """The trained weights."""
        return self.path / "final"

    def weights(self) -> dict[str, str]:
        """Their checksums."""
        return StudentManifest.read(self.path).weights

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
        """The student can be made and trained as the recipe says, and its teacher can be had."""
        from limbeck.teachers.sources import training_source
        from limbeck.training.check import check_student

        recipe = self.recipe
        if not self.keeps_recipe:
            return  # the baseline is the run's own student, trained alike
        if recipe.training.fp16 and choose_device(recipe.training.device) == "cpu":
            raise ConfigError("training.fp16 is true and the device is a CPU, which has no float16. Use --bf16 auto.")
        if not recipe.stages.enabled:
            check_student(recipe)
        for phase, own in recipe.stage_recipes() if recipe.stages.enabled else ():
            try:
                check_student(own)
            except ConfigError as error:
                raise ConfigError(f"stage {phase.stage_name}: {error}") from None
        if recipe.distils and not recipe.teacher.reads_cache:
            check_source(recipe, training_source(recipe))
        for tracker in recipe.training.report_to:
            if find_spec(tracker) is None:
                raise ConfigError(
                    f"training.report_to names {tracker}, which is not installed. Install it "
                    f"(`pip install {tracker}`), or set report_to to []."
                )

    def replaces(self, folder: StageFolder) -> str:
        """Which keys differ; and where the run has only become longer, how to extend the earlier one."""
        changed = super().replaces(folder)
        recorded, wanted = folder.recorded_inputs(), folder.inputs
        if folder.backup is None or "training" not in recorded or "training" not in wanted:
            return changed
        old, new = recorded["training"], wanted["training"]
        rest = [
            {**inputs, "training": {**inputs["training"], **dict.fromkeys(_LENGTHS)}} for inputs in (recorded, wanted)
        ]
        key = _LENGTHS[0] if new[_LENGTHS[0]] > 0 else _LENGTHS[1]
        if fingerprint(rest[0]) != fingerprint(rest[1]) or not 0 < old[key] < new[key]:
            return changed
        return (
            f"{changed}. It is trained from the beginning; to extend the earlier one instead, stop it once steps "
            f"are told and give `--{key.replace('_', '-')} {new[key]} --resume-from {folder.place_in_backup()}`"
        )

    def kept_where(self, folder: StageFolder) -> str:
        """A training in stages keeps its folder, and of its stages those that still hold."""
        if self.recipe.stages.enabled and "stages" in folder.recorded_inputs() and folder.backup is not None:
            return f". What no longer holds of its stages is kept in {folder.backup}"
        return super().kept_where(folder)

    def needs(self) -> str:
        """The student's size, and how much is trained."""
        from limbeck.training.check import describe_student

        recipe, length = self.recipe, self.recipe.training
        steps = f"{length.max_steps} steps" if length.max_steps > 0 else f"{length.num_train_epochs:g} epochs"
        if recipe.stages.enabled:
            steps = "stages " + ", ".join(stage.stage_name for stage in recipe.stages.configs)
        teacher = ""
        if recipe.distils:
            where = recipe.teacher.remote.endpoint[:1] or [recipe.teacher.model or "a cache"]
            teacher = f", teacher {where[0]}" + (" (cached)" if recipe.teacher.reads_cache else "")
        return f"{describe_student(recipe)}; {steps}{teacher}"
