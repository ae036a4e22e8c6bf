"""Training a recipe: one run, or its phases (`stages` in the recipe) one after the other, each in its own folder.

The one idea: a phase is a whole recipe that starts from the weights of the phase before it, so everything a
run can do, a phase can; optimizer and schedule are new in each. A phase is found done by what it is made
from, so a changed or added one leaves those before it as they are.

    student/
      inputs.json  PHASE/{step_N, latest, best, final, manifest.json, …}  best/  final/  manifest.json
"""

import contextlib
from pathlib import Path
from typing import Any

from limbeck import ranks
from limbeck.config import Recipe
from limbeck.console import say
from limbeck.data.tokenizer import recipe_tokenizer
from limbeck.errors import ConfigError, LimbeckError
from limbeck.folders import MANIFEST, StageFolder
from limbeck.manifests import StudentManifest
from limbeck.models import model_identity
from limbeck.storage import fingerprint
from limbeck.training.check import planned_student
from limbeck.training.checkpoints import BEST, publish_model
from limbeck.training.run import check_plan, new_student, train_inputs, train_one, training_rows
from limbeck.training.settle import settled


def run_inputs(recipe: Recipe) -> dict[str, Any]:
    """Everything the trained weights of a recipe depend on, with phases or without."""
    if not recipe.stages.enabled:
        return train_inputs(recipe, training_rows(recipe))
    return {
        "stages": [
            {"stage_name": phase.stage_name, **train_inputs(own, training_rows(own))}
            for phase, own in recipe.stage_recipes()
        ]
    }


def train_recipe(recipe: Recipe, folder: Path | StageFolder, *, force: bool = False) -> StudentManifest | None:
    """Train the recipe's student in `folder` (through its phases, if it has any); returns the manifest, on rank 0.

    Args:
        recipe: what to train.
        folder: where; as a `StageFolder` with its inputs where the caller knows them. One that was trained from other
            inputs is moved to its backup folder, and refused where there is none.
        force: start over.
    """
    if isinstance(folder, Path):
        folder = StageFolder(folder, StudentManifest.command, run_inputs(recipe))
    if not recipe.stages.enabled:
        return train_one(recipe, folder, None, force)
    outer, main = folder, ranks.rank() == 0
    _check(recipe)
    if main:
        _begin(outer, force)
    ranks.wait_until(lambda: outer.recorded() == outer.fingerprint, f"rank 0 to begin {outer.path}")
    start: Path | None = None
    manifest = None
    names = [phase.stage_name for phase in recipe.stages.configs]
    for number, (phase, own) in enumerate(recipe.stage_recipes(), start=1):
        say(f"stage {number} of {len(names)}: {phase.stage_name} ({own.training.mode})")
        inputs = outer.inputs["stages"][number - 1]
        inputs = {key: value for key, value in inputs.items() if key != "stage_name"}
        if start is not None:
            inputs["start"] = model_identity(str(start))["weights"]
        place = StageFolder(outer.path / phase.stage_name, outer.command, inputs, outer.backup)
        manifest = train_one(own, place, start, force)
        start = place.path / "final"
    if main and start is not None:
        manifest = _publish(outer, start.parent, names)
    return manifest


def _check(recipe: Recipe) -> None:
    """Find a later stage's mistakes before the first one has trained for hours."""
    tokenizer = recipe_tokenizer(recipe)
    student = None
    for phase, own in recipe.stage_recipes():
        rows = training_rows(own)
        if student is None and own.training.offload_experts is not None:  # it may not fit: names and shapes are enough
            student, _ = planned_student(own)
        student = student or new_student(own.student, tokenizer, own.dataset.attention, own.seed)
        try:
            check_plan(settled(own), student, rows)
        except ConfigError as error:
            raise ConfigError(f"stage {phase.stage_name}: {error}") from None


def _begin(outer: StageFolder, force: bool) -> None:
    """Begin or go on; phases decide for themselves what of theirs still holds, so their folders stay.

    Raises:
        LimbeckError: there is no backup folder, and a phase there was made from other inputs.
    """
    if "stages" in outer.recorded_inputs() and not force and outer.recorded() != outer.fingerprint:
        if outer.backup is None:
            for phase in outer.inputs["stages"]:
                inputs = {key: value for key, value in phase.items() if key != "stage_name"}
                _refuse_changed(outer.path / phase["stage_name"], inputs)
        (outer.path / MANIFEST).unlink(missing_ok=True)
        outer.record()
    outer.begin(clean=False, replace=force)


def _refuse_changed(folder: Path, inputs: dict[str, Any]) -> None:
    recorded = StageFolder(folder, StudentManifest.command, {}).recorded_inputs()
    if not recorded:
        return
    wanted = StageFolder(folder, StudentManifest.command, {**inputs, "start": recorded.get("start")})
    if fingerprint(recorded) != wanted.fingerprint:
        raise LimbeckError(
            f"{folder} was made from other inputs ({wanted.differences()}). Use another output folder, or --force to "
            "train every stage anew."
        )


def _publish(outer: StageFolder, last: Path, names: list[str]) -> StudentManifest:
    """`final/` and `best/` of the last phase are the run's."""
    publish_model(last / "final", outer.path / "final")
    with contextlib.suppress(FileNotFoundError):
        publish_model(last / BEST, outer.path / BEST)
    changes = {"fingerprint": outer.fingerprint, "stages": names}
    return StudentManifest.read(last).model_copy(update=changes).write(outer.path)
