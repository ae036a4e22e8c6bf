"""What the bare word of a command means: a recipe, the folder of a run, a model's folder, a file, a URL.

The one idea: whoever has a path can give it to any command; what lies there says what it is.
"""

from pathlib import Path

from limbeck.cli.table import MODEL_KEYS, Subcommand
from limbeck.errors import ConfigError
from limbeck.folders import INPUTS, RECIPE

_RECIPE = (".yaml", ".yml", ".json")


def interpret_words(
    command: str, sub: Subcommand, words: list[str], config: str | None
) -> tuple[Path | None, dict[str, str]]:
    """The recipe that the words name, and the keys that they set.

    Args:
        command: for messages.
        sub: its line of the table.
        words: bare words of the command line.
        config: what `--config` names.

    Raises:
        ConfigError: two words, the recipe twice, or nothing that the command can use.
    """
    if len(words) > 1:
        raise ConfigError(f"{command}: unexpected argument {words[1]!r}. Keys are given as `--section.key value`.")
    path = Path(config) if config is not None else None
    if not words:
        return path, {}
    word, place = words[0], Path(words[0])
    if sub.word != "recipe" and not (place.suffix in _RECIPE and place.is_file()):
        return path, {sub.word: word}
    if place.suffix == ".gguf" and sub.function == "eval_student" and path is None:
        saved = run_recipe(place.parent)
        if saved is None:
            raise _no_rows(command, place)
        return saved[0], {"output_dir": str(saved[1]), MODEL_KEYS[sub.function]: word}
    if sub.function == "inspect" and place.suffix not in _RECIPE[:2]:
        return path, {"export.input": word}
    if sub.function in MODEL_KEYS and place.suffix not in _RECIPE and not place.is_dir():
        return path, {MODEL_KEYS[sub.function]: word}  # a name: of the hub, of the package, or of nothing
    if path is not None and not place.is_dir():
        raise ConfigError(f"{command}: the recipe is given twice ({place} and --config).")
    if place.is_dir():
        return _folder(command, sub, place, path)
    return place, {}


def _folder(command: str, sub: Subcommand, folder: Path, config: Path | None) -> tuple[Path | None, dict[str, str]]:
    """A run's folder stands for the recipe it was made from; a model's folder for the model."""
    model = {MODEL_KEYS[sub.function]: str(folder)} if sub.function in MODEL_KEYS else {}
    saved = run_recipe(folder)
    if saved is not None and config is None:
        recipe, root = saved
        if root.resolve() != folder.resolve() and (folder / "config.json").is_file() and model:
            return recipe, {**model, "output_dir": str(root)}
        return recipe, {"output_dir": str(root), **(model if sub.function == "export" else {})}
    if not model:
        raise ConfigError(
            f"{command}: {folder} is a folder and no run's (no recipe.yaml in it). Name a recipe, or a run."
        )
    if sub.function == "eval_student" and config is None:
        raise _no_rows(command, folder)
    return config, model


def _no_rows(command: str, place: Path) -> ConfigError:
    return ConfigError(
        f"{command}: {place} lies in no run's folder, so there are no held-out rows to score it on. Name the "
        f"recipe they come from: `limbeck eval RECIPE.yaml --model {place}`."
    )


def run_recipe(folder: Path) -> tuple[Path, Path] | None:
    """The recipe of the run that the folder is or lies in, and the run's folder; None outside runs."""
    for place in (folder, *list(folder.resolve().parents)[:3]):
        saved = place / RECIPE
        if saved.is_file() and not (place / INPUTS).exists():  # a student's folder keeps a recipe of its own
            return saved, place
    return None
