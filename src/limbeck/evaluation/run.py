"""Evaluate a recipe's models: the student, the CE baseline and the teacher, on the same held-out rows."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from limbeck.config import Recipe
from limbeck.console import say
from limbeck.data.dataset import PackedDataset
from limbeck.data.tokenizer import LoadedTokenizer, load_tokenizer, recipe_tokenizer, require_same
from limbeck.errors import LimbeckError
from limbeck.evaluation.suites import Subject, Suite, suites_of, table
from limbeck.models import choose_dtype, load_causal_lm, require_packing, verified_transform
from limbeck.storage import atomic_write_text
from limbeck.teachers.choose import choose_device


def evaluate_recipe(recipe: Recipe, models: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Scores of each named model folder, and of the teacher first when the recipe names one.

    Raises:
        LimbeckError: no held-out rows, or a model with another tokenizer than the data's.
    """
    rows = PackedDataset(recipe.packed_dir, "validation", recipe.evaluation.max_rows)
    if not len(rows):
        raise LimbeckError(
            f"{recipe.packed_dir} has no held-out rows. Raise dataset.validation_fraction and pack again."
        )
    tokenizer = recipe_tokenizer(recipe)
    rows.check(tokenizer)
    suites, teacher = suites_of(recipe), None
    results: dict[str, dict[str, Any]] = {}

    def score(name: str, model: Any) -> None:
        subject = Subject(name, model.eval(), tokenizer, rows, teacher, recipe)
        results[name] = {key: value for suite in suites for key, value in suite.run(subject).items()}

    if recipe.teacher.model is not None and not recipe.teacher.is_remote:
        section = recipe.teacher
        source: dict[str, Any] = {"revision": section.revision, "trust_remote_code": section.trust_remote_code}
        teacher = _load(recipe, recipe.teacher.model, tokenizer, section.dtype, section.device, **source)
        score("teacher", teacher)
    if recipe.teacher.is_remote:
        say("no KL to the teacher in the table: it is remote. The run's log has it for the held-out rows (eval_steps)")
    for name, folder in models.items():
        score(name, _load(recipe, folder, tokenizer, "auto", trust_remote_code=recipe.student.trust_remote_code))
    return results


def _load(
    recipe: Recipe, name: str, tokenizer: LoadedTokenizer, dtype: str, device: str | None = None, **source: Any
) -> Any:
    own = load_tokenizer(name, **source)
    require_same(own.hash, tokenizer.hash, f"model {name}", f"data {recipe.packed_dir}")
    where = choose_device(device or recipe.training.device)
    model = load_causal_lm(name, dtype=choose_dtype(dtype, where), **source).to(where)
    verified_transform(model)
    if recipe.dataset.attention == "per_document":
        require_packing(model, name)
    return model


def write_results(folder: Path, results: dict[str, dict[str, Any]], suites: Sequence[Suite]) -> None:
    """Save `results.json` and the table as `results.md`."""
    atomic_write_text(folder / "results.json", json.dumps(results, indent=2) + "\n")
    header, *body = table(results, suites)
    lines = [header, ["---"] * len(header), *body]
    atomic_write_text(folder / "results.md", "".join("| " + " | ".join(line) + " |\n" for line in lines))
