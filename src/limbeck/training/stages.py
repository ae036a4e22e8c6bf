"""Training a recipe: one run, or its stages one after the other, each in a folder of its own.

The one idea: a stage is a whole recipe that starts from the weights of the stage before it, so everything a
run can do, a stage can; optimizer and schedule are new in each. A stage is found done by what it is made
from, so a changed or added stage leaves those before it as they are.

    student/
      inputs.json  STAGE/{step_N, latest, best, final, manifest.json, …}  best/  final/  manifest.json
"""

import contextlib
from pathlib import Path
from typing import Any

from limbeck import ranks
from limbeck.config import Recipe
from limbeck.console import say
from limbeck.data.tokenizer import recipe_tokenizer
from limbeck.errors import ConfigError, LimbeckError
from limbeck.storage import (
    INPUTS,
    MANIFEST,
    StageFolder,
    fingerprint,
    read_json,
    write_json,
    write_manifest,
)
from limbeck.training.checkpoints import BEST, publish_model
from limbeck.training.run import check_plan, new_student, train_inputs, train_one, training_rows


def run_inputs(recipe: Recipe) -> dict[str, Any]:
    """Everything the trained weights of a recipe depend on, with stages or without."""
    if not recipe.stages.enabled:
        return train_inputs(recipe, training_rows(recipe))
    return {
        "stages": [
            {"stage_name": stage.stage_name, **train_inputs(own, training_rows(own))}
            for stage, own in recipe.stage_recipes()
        ]
    }


def train(recipe: Recipe, folder: Path, *, aside: Path | None = None, force: bool = False) -> dict[str, Any]:
    """Train the recipe's student in `folder` (through its stages, if it has any); returns the manifest.

    A folder trained from other inputs is moved into `aside` when that is given, and refused otherwise; `force`
    starts over.
    """
    if not recipe.stages.enabled:
        return train_one(recipe, folder, None, aside, force)
    outer = StageFolder(folder, "train", run_inputs(recipe), aside)
    main = ranks.rank() == 0
    _check(recipe)
    if main:
        _begin(outer, recipe, force)
    ranks.wait_until(lambda: outer.recorded() == outer.fingerprint, f"rank 0 to begin {folder}")
    start: Path | None = None
    manifest: dict[str, Any] = {}
    names = [stage.stage_name for stage in recipe.stages.configs]
    for number, (stage, own) in enumerate(recipe.stage_recipes(), start=1):
        say(f"stage {number} of {len(names)}: {stage.stage_name} ({own.training.mode})")
        place = folder / stage.stage_name
        manifest = train_one(own, place, start, aside, force)
        start = place / "final"
    if main and start is not None:
        manifest = _publish(outer, start.parent, names)
    return manifest


def _check(recipe: Recipe) -> None:
    """Find a later stage's mistakes before the first one has trained for hours."""
    tokenizer = recipe_tokenizer(recipe)
    student = None
    for stage, own in recipe.stage_recipes():
        rows = training_rows(own)
        student = student or new_student(own, tokenizer, None, None)
        try:
            check_plan(own, student, rows)
        except ConfigError as error:
            raise ConfigError(f"stage {stage.stage_name}: {error}") from None


def _begin(outer: StageFolder, recipe: Recipe, force: bool) -> None:
    """Begin or go on; stages decide for themselves what of theirs still holds, so their folders stay.

    Raises:
        LimbeckError: nothing may be set aside, and a stage there was made from other inputs.
    """
    path = outer.path / INPUTS
    recorded = read_json(path)["inputs"] if path.exists() else {}
    if "stages" in recorded and not force and outer.recorded() != outer.fingerprint:
        if outer.aside is None:
            for stage, own in recipe.stage_recipes():
                _refuse_changed(outer.path / stage.stage_name, train_inputs(own, training_rows(own)))
        (outer.path / MANIFEST).unlink(missing_ok=True)
        write_json(path, {"fingerprint": outer.fingerprint, "inputs": outer.inputs})
    outer.begin(clean=False, replace=force)


def _refuse_changed(folder: Path, inputs: dict[str, Any]) -> None:
    path = folder / INPUTS
    if not path.exists():
        return
    recorded = read_json(path)["inputs"]
    wanted = StageFolder(folder, "train", {**inputs, "start": recorded.get("start")})
    if fingerprint(recorded) != wanted.fingerprint:
        raise LimbeckError(
            f"{folder} was made from other inputs ({wanted.differences()}). Use another output folder, or --force to "
            "train every stage anew."
        )


def _publish(outer: StageFolder, last: Path, names: list[str]) -> dict[str, Any]:
    """`final/` and `best/` of the last stage are the run's."""
    publish_model(last / "final", outer.path / "final")
    with contextlib.suppress(FileNotFoundError):
        publish_model(last / BEST, outer.path / BEST)
    of_last = read_json(last / MANIFEST)
    return write_manifest(outer.path, {**of_last, "fingerprint": outer.fingerprint, "stages": names})
