"""The student without its weights: what it will be, known before any stage has run.

The one idea: a model on torch's meta device has every name and shape and takes no memory, so ternary groups, optimizer
rules and export formats can be tried on it in a moment, whatever its size.
"""

from typing import Any

import torch

from limbeck.config import StudentConfig
from limbeck.errors import ConfigError
from limbeck.models import model_config, require_context
from limbeck.registry import STUDENTS
from limbeck.students.build import finish_student, require_vocabulary


def outline_of(section: StudentConfig, keys: dict[str, int], length: int, planned: Any = None) -> Any | None:
    """The student on the meta device, its ternary weights chosen; None where a plugin builds it in a way of its own.

    Args:
        section: the recipe's `student`.
        keys: the tokenizer's `vocab_size` and special ids, where it is known already.
        length: tokens in a row.
        planned: the config of weights that an earlier stage will make.

    Raises:
        ConfigError: there is no such student: no architecture, a vocabulary smaller than the tokenizer's, a context
            shorter than the rows, ternary patterns or groups that do not fit.
        LimbeckError: its folder or hub id gives no config.
    """
    build = STUDENTS.get(section.builder or "transformers")
    try:
        with torch.device("meta"):
            student = _of_weights(section, planned) if section.model else build(section, keys)
    except (NotImplementedError, RuntimeError):
        if section.builder is None:
            raise
        return None  # a builder that computes with what it makes
    require_vocabulary(section, student, keys.get("vocab_size", 0))
    if section.model:
        require_context(student.config, length, f"student {section.model}")
    else:
        require_context(student.config, length, "student", "raise student.config.max_position_embeddings")
    with torch.device("meta"):
        finish_student(student, section)
    return student


def _of_weights(section: StudentConfig, planned: Any) -> Any:
    from transformers import AutoModelForCausalLM

    assert section.source is not None
    config = model_config(section.source, "student") if planned is None else planned
    wanted = section.config.get("model_type", config.model_type)
    if wanted != config.model_type:
        raise ConfigError(
            f"student.config.model_type is {wanted} and {section.model} holds a {config.model_type}. Leave model_type "
            "out: weights bring their own architecture."
        )
    for key, value in section.config.items():
        setattr(config, key, value)
    remote_code = section.trust_remote_code
    try:
        return AutoModelForCausalLM.from_config(config, trust_remote_code=remote_code)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{section.model} is no causal LM: {str(error).strip().splitlines()[0][:300]}") from None
