"""Evaluate a recipe's models: the student, the CE baseline and the teacher, on the same held-out rows."""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from limbeck.config import ModelSource, Recipe
from limbeck.data.dataset import PackedDataset
from limbeck.data.tokenizer import LoadedTokenizer, load_tokenizer, recipe_tokenizer, require_same
from limbeck.errors import LimbeckError
from limbeck.evaluation.suites import Subject, Suite, suites_of, table
from limbeck.models import load_frozen, require_packing, verified_transform
from limbeck.serving.model import is_gguf
from limbeck.serving.scoring import ScoredGguf
from limbeck.storage import atomic_write_text
from limbeck.teachers.sources import scoring_source


def evaluate_recipe(recipe: Recipe, models: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Scores of each named model folder, and first of the teacher where it is in this process.

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
    suites = suites_of(recipe.evaluation.suites)
    attention, remote_code = recipe.dataset.attention, recipe.student.trust_remote_code
    results: dict[str, dict[str, Any]] = {}
    with contextlib.ExitStack() as stack:
        source, teacher = scoring_source(recipe), None
        if source is not None and source.is_available(tokenizer):
            teacher = source.open(tokenizer, rows)
            stack.callback(teacher.close)

        def score(name: str, model: Any) -> None:
            top_k, size = recipe.teacher.top_k or 64, recipe.evaluation.batch_size
            subject = Subject(name, model, tokenizer, rows, teacher, attention, top_k, size)
            results[name] = {key: value for suite in suites for key, value in suite.run(subject).items()}

        if teacher is not None and teacher.model is not None:
            score("teacher", teacher.model)
        for name, folder in models.items():
            if is_gguf(folder):
                score(name, ScoredGguf(Path(folder), recipe.engine, tokenizer))
                continue
            model = ModelSource(folder, None, remote_code)
            score(name, _load(model, tokenizer, recipe.training.device, attention, recipe.packed_dir))
    return results


def _load(source: ModelSource, tokenizer: LoadedTokenizer, device: str | None, attention: str, data: Path) -> Any:
    own = load_tokenizer(*source)
    require_same(own, tokenizer, f"model {source.name}", f"the data in {data}")
    model = load_frozen(source, "auto", device)
    verified_transform(model)
    if attention == "per_document":
        require_packing(model, source.name)
    return model


def write_results(folder: Path, results: dict[str, dict[str, Any]], suites: Sequence[Suite]) -> None:
    """Save `results.json` and the table as `results.md`."""
    atomic_write_text(folder / "results.json", json.dumps(results, indent=2) + "\n")
    header, *body = table(results, suites)
    lines = [header, ["---"] * len(header), *body]
    atomic_write_text(folder / "results.md", "".join("| " + " | ".join(line) + " |\n" for line in lines))
