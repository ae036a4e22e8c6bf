"""A recipe with nothing left open: what `auto` stands for, once the student is known."""

from typing import Any

from limbeck.config import Recipe, StudentConfig
from limbeck.models import model_config
from limbeck.optim.auto import OptimizerChoice, choose


def settled(recipe: Recipe) -> Recipe:
    """The recipe with the optimizer and the rates that `optimizer.name: auto` means for its student."""
    choice = optimizer_choice(recipe)
    if choice is None:
        return recipe
    training = recipe.training.model_copy(update={"learning_rate": choice.learning_rate})
    return recipe.model_copy(update={"optimizer": choice.optimizer, "training": training})


def optimizer_choice(recipe: Recipe) -> OptimizerChoice | None:
    """What `auto` stands for; None where the recipe names its optimizer."""
    if recipe.optimizer.name != "auto":
        return None
    section = recipe.student
    if recipe.compress is not None:  # as wide as what is compressed, which is there already
        width: int | None = model_config(recipe.compress_source, "compress.model").get_text_config().hidden_size
    else:
        width = _hidden_size(section)
    return choose(recipe.optimizer, recipe.training.learning_rate, new=section.model is None, width=width)


def _hidden_size(section: StudentConfig) -> int | None:
    """The student's width, from its config alone."""
    from transformers import AutoConfig

    config: Any = None
    if section.source is not None:
        config = model_config(section.source, "student")
    elif "model_type" in section.config:
        try:
            config = AutoConfig.for_model(**section.config)
        except (ValueError, TypeError, KeyError):
            return None  # whoever builds it says what is wrong
    found = section.config.get("hidden_size") if config is None else config.get_text_config().hidden_size
    return found if isinstance(found, int) and found > 0 else None
