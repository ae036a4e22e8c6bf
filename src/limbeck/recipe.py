"""From YAML and flags to a checked `Recipe`.

The one idea: a recipe file and the flags after it are the same thing, a tree of keys; the flags are laid
over the file and the whole is checked once. An unknown key is refused with the nearest known one.
"""

import json
import re
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from limbeck.config import MHCConfig, Recipe, TernaryConfig
from limbeck.config.base import Section, merged
from limbeck.config.messages import explain
from limbeck.config.moved import EARLIER, rewritten
from limbeck.config.presets import PRESETS
from limbeck.errors import ConfigError
from limbeck.plugins import load_plugins, named_plugins

#: Spellings users already write for a key. `_` and `-` are the same in every flag.
ALIASES: Mapping[str, str] = {
    "total-steps": "training.max_steps",
    "max-steps": "training.max_steps",
    "warmup-steps": "training.warmup_steps",
    "batch-size": "training.per_device_train_batch_size",
    "gradient-accumulation-steps": "training.gradient_accumulation_steps",
    "num-train-epochs": "training.num_train_epochs",
    "seq-len": "dataset.max_length",
    "max-length": "dataset.max_length",
    "max-seq-length": "dataset.max_length",
    "lr": "training.learning_rate",
    "learning-rate": "training.learning_rate",
    "optimizer": "optimizer.name",
    "mhc-lr": "optimizer.mhc.learning_rate",
    "enable-saddle-interventions": "saddle.enabled",
    "kl-weight": "loss.alpha",
    "alpha": "loss.alpha",
    "temperature": "loss.temperature",
    "checkpoint-dir": "training.output_dir",
    "checkpoint-interval": "training.save_steps",
    "keep-last-checkpoints": "training.save_total_limit",
    "log-interval": "training.logging_steps",
    "eval-interval": "training.eval_steps",
    "resume-from": "training.resume_from",
    "bf16": "training.bf16",
    "fp16": "training.fp16",
    "device": "training.device",
    "report-to": "training.report_to",
    "teacher-model": "teacher.model",
    "teacher-endpoint": "teacher.remote.endpoint",
    "parallel": "teacher.remote.parallel",
    "micro-batches": "teacher.remote.micro_batches",
    "top-k": "teacher.top_k",
    "teacher-topk": "teacher.top_k",
    "cache-dir": "teacher.cache.dir",
    "use-cached-logits": "teacher.use_cached_logits",
    "student-model": "student.model",
    "tokenizer": "tokenizer.name",
    "dataset": "dataset.name",
    "dataset-config": "dataset.config_name",
    "split": "dataset.split",
    "text-column": "dataset.text_column",
    "max-samples": "dataset.max_samples",
    "num-proc": "dataset.num_proc",
    "recursive": "dataset.recursive",
}


class _Loader(yaml.SafeLoader):
    """YAML where `1e-3` is a number and `on` is a word, as in YAML 1.2."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (the library's own attribute)
        first: [(tag, pattern) for tag, pattern in pairs if tag != "tag:yaml.org,2002:bool"]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


_MOST_NODES = 100_000


def _read_yaml(text: str) -> Any:
    """The value of a YAML document, once it is known to be small when its aliases are written out.

    Raises:
        yaml.YAMLError, RecursionError: no YAML, a key twice in one mapping, or more values than any recipe has.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _size(node, {}) > _MOST_NODES:
            raise yaml.YAMLError(f"its aliases stand for more than {_MOST_NODES:,} values")
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _size(node: Any, known: dict[int, int]) -> int:
    """Values in a node with all aliases written out; refuses a mapping with a key twice."""
    if id(node) in known:
        return known[id(node)]
    known[id(node)] = _MOST_NODES + 1  # until it is known: a node inside itself has no end
    size = 1
    if isinstance(node, yaml.SequenceNode):
        size += sum(_size(part, known) for part in node.value)
    elif isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen and key.value != "<<":
                    line = key.start_mark.line + 1
                    raise yaml.YAMLError(f"the key {key.value!r} stands twice (line {line}); remove one")
                seen.add(key.value)
            size += _size(key, known) + _size(value, known)
    known[id(node)] = min(size, _MOST_NODES + 1)
    return known[id(node)]


def sections(annotation: Any) -> type[Section] | None:
    """The section inside an annotation such as `Section`, `Section | None` or `list[Section]`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, list):
        for argument in typing.get_args(annotation):
            if (model := sections(argument)) is not None:
                return model
    return None


def keys(model: type[Section] = Recipe, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key of the recipe that holds a value, with its pydantic field."""
    for name, field in model.model_fields.items():
        inner = sections(field.annotation)
        if inner is not None and typing.get_origin(field.annotation) is not list:
            yield from keys(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def optional_sections(model: type[Section] = Recipe, prefix: str = "") -> Iterator[str]:
    """Every dotted key of a section, which may be given as a whole, or as null where it may be absent."""
    for name, field in model.model_fields.items():
        inner = sections(field.annotation)
        if inner is not None and typing.get_origin(field.annotation) is not list:
            yield f"{prefix}{name}"
            yield from optional_sections(inner, f"{prefix}{name}.")


def tree_of(given: Mapping[str, str], origins: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The tree of keys that flags stand for.

    Values are YAML, so `true`, `null`, `1e-3` and `[a, b]` mean what they mean in a recipe.

    Args:
        given: dotted key -> the text given for it.
        origins: dotted key -> the flag it was given by, for messages.

    Raises:
        ConfigError: a value is no YAML.
    """
    known = dict(keys())
    tree: dict[str, Any] = {}
    for key, text in given.items():
        flag = (origins or {}).get(key, f"--{key}")
        _set_key(tree, key.split("."), _read_value(text, flag, known.get(key)))
    return tree


def _read_value(text: str, flag: str, field: Any) -> Any:
    """A flag's value: the text itself for keys that hold text or a path, YAML for the others."""
    kinds = _alternatives(field.annotation) if field is not None else set()
    if kinds & {str, Path}:
        return None if text == "null" and type(None) in kinds else text
    try:
        return _read_yaml(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"the value of {flag} is not valid YAML: {text!r}") from error


def _alternatives(annotation: Any) -> set[Any]:
    """The types that a value may have, without what is inside lists and mappings."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return set().union(*map(_alternatives, typing.get_args(annotation)))
    if typing.get_origin(annotation) is typing.Annotated:
        return _alternatives(typing.get_args(annotation)[0])
    return {annotation}


def _set_key(tree: dict[str, Any], path: list[str], value: Any) -> None:
    for part in path[:-1]:
        if isinstance(tree.get(part), str):  # a part that was given by its name alone
            tree[part] = {"name": tree[part]}
        tree = tree.setdefault(part, {})
    known = tree.get(path[-1])
    tree[path[-1]] = {**known, "name": value} if isinstance(known, dict) and isinstance(value, str) else value


def load_recipe(
    path: Path | None,
    overrides: Mapping[str, Any] | None = None,
    origins: Mapping[str, str] | None = None,
    *,
    tiny: bool = False,
) -> Recipe:
    """Read a YAML recipe, lay the overrides over it and check the whole.

    Args:
        path: the file; None for the defaults.
        overrides: a tree of keys.
        origins: dotted key of an override -> the flag it was given by, for messages.
        tiny: lay the recipe's own `tiny` over it.

    Raises:
        ConfigError: the file is missing, is not YAML, or a key or value is wrong; the message gives the
            dotted key, the value found, and for a misspelt key the nearest known one.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        if not path.is_file():
            raise ConfigError(f"recipe {path} does not exist. Give the path of a YAML file.")
        try:
            tree = _read_yaml(path.read_text(encoding="utf-8")) or {}
        except RecursionError:
            raise ConfigError(f"recipe {path} is nested too deeply; no recipe is.") from None
        except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
            raise ConfigError(f"recipe {path} is not valid YAML: {_yaml_problem(error)}") from error
        if not isinstance(tree, dict):
            raise ConfigError(f"recipe {path} holds a {type(tree).__name__}; it must be a mapping of sections.")
        tree.setdefault("name", path.stem)
    if tiny:
        tree = _made_tiny(tree, path)
    tree = _replaced_student(rewritten(tree), overrides or {})
    tree = rewritten(merged(tree, overrides or {}), override=True)
    where = str(path or "configuration")
    load_plugins(named_plugins(tree.get("plugins")))
    try:
        recipe = Recipe.model_validate(tree)
        if recipe.stages.enabled:
            for stage in recipe.stages.configs:
                where = f"{path or 'configuration'}, stage {stage.stage_name}"
                recipe.stage_recipe(stage)
    except ValidationError as error:
        known = [key for key, _ in keys()] + list(Recipe.model_fields) + list(EARLIER)
        raise ConfigError(explain(error, where, known, origins)) from None
    return recipe


def _made_tiny(tree: dict[str, Any], path: Path | None) -> dict[str, Any]:
    """The recipe with its own `tiny` laid over it."""
    small = tree.pop("tiny", None)
    if not isinstance(small, dict) or not small:
        raise ConfigError(f"--tiny is given and {path or 'there'} has no section `tiny`, whose keys it would take.")
    return rewritten(merged(rewritten(tree), small), override=True)


def _yaml_problem(error: Exception) -> str:
    """What is wrong and where, in one line."""
    mark = getattr(error, "problem_mark", None)
    said = getattr(error, "problem", None) or str(error)
    where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark is not None else ""
    return " ".join(str(said).split()) + where


def _replaced_student(tree: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`--student-model` or `--student.preset` over a recipe's student: what described that one is left out.

    Kept are keys beside the architecture (ternary, mhc) that the recipe gave itself, and keys of `config` that are laid
    over weights, or over another preset of the same architecture.
    """
    student, given = tree.get("student"), overrides.get("student")
    if not isinstance(student, dict) or not isinstance(given, Mapping):
        return tree
    preset, other = PRESETS.get(str(student.get("preset"))), PRESETS.get(str(given.get("preset")))
    written = student.get("config")
    config: dict[str, Any] = written if isinstance(written, dict) else {}
    kind = config.get("model_type", (preset or {}).get("config", {}).get("model_type"))
    if other is not None and other is not preset:
        alike = preset is not None and other["config"]["model_type"] == kind
        gone = {"preset", "builder"} if alike else {"preset", "builder", "config"}
    elif given.get("model") and kind is not None:
        gone = {"preset", "builder", "config"}
    else:
        return tree
    brought = {key for key in ("ternary", "mhc") if preset and student.get(key) == _whole(key, preset.get(key))}
    kept = {key: value for key, value in student.items() if key not in gone | brought}
    if preset and "config" in kept:
        kept["config"] = {key: value for key, value in config.items() if preset["config"].get(key) != value}
    return {**tree, "student": kept}


def _whole(key: str, given: Any) -> Any:
    """A preset's section with its defaults, as a saved recipe has it."""
    model: type[Section] = TernaryConfig if key == "ternary" else MHCConfig
    return None if given is None else model.model_validate(given).model_dump(mode="json")


def as_written(recipe: Recipe) -> str:
    """The keys that a recipe and its flags gave, as YAML; read again they give the same recipe."""
    given = json.loads(recipe.model_dump_json(exclude_unset=True))
    return yaml.safe_dump(given, sort_keys=False, allow_unicode=True)
