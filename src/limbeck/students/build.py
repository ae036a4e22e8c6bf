"""The student of a recipe: pretrained weights or a new model, with its ternary weights chosen.

The one idea: a student is any causal LM of transformers; what limbeck adds to it (ternary weights) is recorded
in its config, so that every checkpoint says what it is.
"""

import re
from typing import Any

from limbeck.config import StudentConfig, TernaryConfig
from limbeck.errors import ConfigError
from limbeck.models import hidden_matrices, load_causal_lm
from limbeck.registration import METHOD
from limbeck.registry import STUDENTS
from limbeck.students.ternary import TernaryState, apply_ternary


def build_student(config: StudentConfig, keys: dict[str, int], seed: int) -> Any:
    """The student in float32: pretrained weights, or a new model of `student.config`.

    Args:
        config: the recipe's `student`.
        keys: the tokenizer's (`LoadedTokenizer.model_keys`), which a new model takes where its config says nothing.
        seed: of new weights.

    Raises:
        ConfigError: neither weights nor an architecture are named, or the vocabulary is smaller than the tokenizer's.
    """
    from transformers import set_seed

    set_seed(seed)
    student = STUDENTS.get(config.builder or "transformers")(config, keys)
    require_vocabulary(config, student, keys["vocab_size"])
    finish_student(student, config)
    return student


def finish_student(student: Any, config: StudentConfig) -> None:
    """Add to a model, in place, what the recipe's `student` asks for beside an architecture: streams, ternary weights.

    Raises:
        ConfigError: the model cannot have them.
    """
    if config.mhc is not None:
        from limbeck.students.mhc.models import add_streams

        add_streams(student, config.mhc.streams, config.mhc.form)
    if config.ternary is not None:
        make_ternary(student, config.ternary)


def require_vocabulary(config: StudentConfig, student: Any, wanted: int) -> None:
    """Refuse a student that has fewer ids than the tokenizer.

    Raises:
        ConfigError: names both sizes.
    """
    held = student.config.get_text_config().vocab_size
    if held < wanted:
        cure = "Choose a model of the tokenizer's vocabulary" if config.model else "Raise student.config.vocab_size"
        raise ConfigError(f"the student's vocab_size is {held} and the tokenizer has {wanted} ids. {cure}.")


@STUDENTS.register("transformers")
def _of_transformers(config: StudentConfig, keys: dict[str, int]) -> Any:
    """A causal LM of transformers: the weights that are named, or a new model; `keys` are the tokenizer's."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM

    if config.model is not None:
        return load_causal_lm(
            config.model,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            dtype="float32",
            **config.config,
        )
    if not config.config:
        raise ConfigError("no student: set student.model to pretrained weights or student.config to an architecture.")
    try:
        _refuse_unknown_keys(config.config)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**keys, **config.config}))
    except (ValueError, TypeError, ZeroDivisionError, StrictDataclassError) as error:
        raise ConfigError(f"student.config does not describe a causal LM: {error}") from error


def _refuse_unknown_keys(config: dict[str, Any]) -> None:
    """A misspelt size would silently fall back to the architecture's default, often thousands wide."""
    from difflib import get_close_matches

    from transformers import AutoConfig

    default = AutoConfig.for_model(config["model_type"])
    # Other spellings (attribute_map) are keys too, and many models read a head_dim that their config does not list.
    known = {"model_type", "rope_theta", "rope_scaling", "head_dim", *default.attribute_map, *default.to_dict()}
    for key in config:
        if key not in known:
            near = get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"student.config has no key {key!r} for model_type {config['model_type']}{hint}")


#: Matrices that are experts or stand for them; what brings hidden states to latent experts and back is neither.
_EXPERTS = r"experts\.(?!(encoder|decoder)\.)"


def choose_ternary(model: Any, config: TernaryConfig) -> list[str]:
    """Names of the weights that become ternary.

    Raises:
        ConfigError: a pattern is no regular expression or matches no weight that could, or nothing is chosen.
    """
    matrices = {name for name, layout in hidden_matrices(model).items() if not layout.low_rank}
    names = [name for name, _ in model.named_parameters()]
    patterns = {"linears": [".*"], "experts": [_EXPERTS], "none": []}[config.preset]
    chosen = {name for name in matrices if _matches_any(name, patterns)}
    for pattern in config.patterns:
        found = {name for name in names if _matches_any(name, [pattern])}
        if not found:
            raise ConfigError(f"student.ternary.patterns: {pattern!r} matches no parameter of {type(model).__name__}.")
        chosen |= found
    for pattern in config.exclude:
        found = {name for name in chosen if _matches_any(name, [pattern])}
        if not found:
            raise ConfigError(f"student.ternary.exclude: {pattern!r} matches none of the weights that were chosen.")
        chosen -= found
    if not chosen:
        raise ConfigError(
            f"student.ternary chooses no weight of {type(model).__name__} (preset {config.preset}). "
            "Choose another preset, or patterns."
        )
    return [name for name in names if name in chosen]


def _matches_any(name: str, patterns: list[str]) -> bool:
    try:
        return any(re.search(pattern, name) for pattern in patterns)
    except re.error as error:
        raise ConfigError(f"student.ternary: {patterns[0]!r} is not a regular expression ({error}).") from None


def make_ternary(model: Any, config: TernaryConfig) -> list[str]:
    """Make a model's chosen weights ternary in use and record it in its config; returns their names."""
    names = choose_ternary(model, config)
    state = TernaryState(config.group_size, config.scale, config.activation_bits)
    apply_ternary(model, names, state)
    model.config.quantization_config = {
        "quant_method": METHOD,
        "format": "shadow",
        "weights": names,
        "group_size": config.group_size,
        "scale": config.scale,
        "activation_bits": config.activation_bits,
    }
    return names
