"""The table of held-out scores."""

from collections.abc import Sequence
from typing import Any

from limbeck.config import Recipe
from limbeck.data.tokenizer import recipe_tokenizer
from limbeck.errors import ConfigError
from limbeck.folders import StageFolder
from limbeck.manifests import EvaluationManifest, PackedManifest
from limbeck.plugins import plugin_identity
from limbeck.registry import STAGES
from limbeck.stages.base import Stage
from limbeck.storage import read_json


@STAGES.register("evaluate")
class EvaluateStage(Stage):
    """Students and teacher to scores on the held-out rows.

    Args:
        models: the stages whose models are scored.
    """

    scores_held_out = True

    def __init__(self, recipe: Recipe, models: Sequence[Stage]) -> None:
        after = ["pack", *(stage.name for stage in models)]
        super().__init__(recipe, "evaluate", recipe.root / "evaluation", after=after)
        self.models = {stage.label: stage for stage in models}

    @classmethod
    def of(cls, recipe: Recipe, before: Sequence[Stage]) -> list[Stage]:
        """One, of whatever was trained, and of the compressed model that it started from."""
        return [cls(recipe, [stage for stage in before if stage.label])]

    def inputs(self) -> dict[str, Any]:
        """The students, the rows, the teacher, and what is measured."""
        from limbeck.teachers.sources import scoring_source

        recipe, tokenizer = self.recipe, recipe_tokenizer(self.recipe)
        source = scoring_source(recipe)
        made = self._inputs(None if source is None else source.inputs(tokenizer))
        if source is None or StageFolder(self.path, self.command, made, self.backup).is_kept():
            return made
        return made if source.is_available(tokenizer) else self._inputs(None)

    def _inputs(self, teacher: dict[str, Any] | None) -> dict[str, Any]:
        recipe = self.recipe
        return {
            "packed": PackedManifest.read(recipe.packed_dir).fingerprint,
            "students": {name: stage.weights() for name, stage in self.models.items()},
            "teacher": teacher,
            "attention": recipe.dataset.attention,
            "max_rows": recipe.evaluation.max_rows,
            "top_k": recipe.teacher.top_k,
            "suites": recipe.evaluation.model_dump(mode="json", include={"suites"})["suites"],
            "plugins": plugin_identity(recipe.plugins),
        }

    def make(self, folder: StageFolder, *, force: bool) -> None:
        """Score."""
        from limbeck.evaluation.run import evaluate_recipe, write_results
        from limbeck.evaluation.suites import suites_of

        folder.begin(replace=force)
        results = evaluate_recipe(self.recipe, {name: str(stage.model_folder) for name, stage in self.models.items()})
        write_results(folder.path, results, suites_of(self.recipe.evaluation.suites))
        EvaluationManifest(fingerprint=folder.fingerprint).write(folder.path)

    def check(self) -> None:
        """Something is held out."""
        if self.recipe.dataset.validation_fraction == 0.0:
            raise ConfigError("dataset.validation_fraction is 0 and the run ends with held-out scores; raise it.")

    def read(self) -> dict[str, Any]:
        """`evaluation`: the scores of each model."""
        return {"evaluation": read_json(self.path / "results.json")}

    def text(self, found: dict[str, Any]) -> str:
        """The table."""
        from limbeck.evaluation.suites import suites_of, table_text

        return table_text(found["evaluation"], suites_of(self.recipe.evaluation.suites))
