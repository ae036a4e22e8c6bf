"""Keys that are set and mean nothing in what a recipe chooses: told before any work, so that nobody waits for them.

The one idea: a rule names keys and what makes them count; a key that differs from its default and does not count is
reported with the reason. Switches that say so themselves (`enabled: false`) need no rule.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from limbeck.config.base import Section
from limbeck.config.recipe import Recipe
from limbeck.registration import MHC_PREFIX


@dataclass(frozen=True)
class _EffectRule:
    """Keys (with a dot at the end: all of a section) that count only when `counts`, and why else they do not."""

    keys: Sequence[str]
    counts: Callable[[Recipe], bool]
    why: str


def _reads_hub_dataset(recipe: Recipe) -> bool:
    return recipe.dataset.name != "stdlib" and not Path(recipe.dataset.name).is_file()


def _may_have_streams(recipe: Recipe) -> bool:
    student = recipe.student
    return (
        student.mhc is not None
        or student.model is not None  # which may have them already
        or str(student.config.get("model_type")).startswith(MHC_PREFIX)
    )


_RULES = (
    _EffectRule(["teacher.remote."], lambda r: r.teacher.is_remote, "no teacher.endpoint is set"),
    _EffectRule(["teacher.local."], lambda r: not r.teacher.is_remote, "the teacher is remote (teacher.endpoint)"),
    _EffectRule(["teacher.top_k"], lambda r: r.teacher.sampling is None, "teacher.sampling replaces it"),
    _EffectRule(["teacher.revision", "teacher.trust_remote_code"], lambda r: r.teacher.model is not None,
          "no teacher.model is set"),
    _EffectRule(["student.revision", "student.trust_remote_code"], lambda r: r.student.model is not None,
          "no student.model is set"),
    _EffectRule(["optimizer.mhc."], _may_have_streams, "the student has no streams (student.mhc)"),
    _EffectRule(["teacher.use_cached_logits", "teacher.temperatures", "teacher.sampling", "loss.alpha",
           "loss.temperature", "loss.divergence", "loss.tail"], lambda r: r.distils, "training.mode is ce"),
    _EffectRule(["teacher.cache."], lambda r: not r.distils or r.teacher.reads_cache,
          "targets are not cached (teacher.use_cached_logits)"),
    _EffectRule(["dataset.config_name", "dataset.revision", "dataset.streaming"], _reads_hub_dataset,
          "dataset.name is no dataset"),
    _EffectRule(["training.num_train_epochs"], lambda r: r.training.max_steps == -1, "training.max_steps decides"),
    _EffectRule(["training.decay_ratio", "training.decay_type"],
          lambda r: r.training.lr_scheduler_type == "warmup_stable_decay" or r.stages.enabled,
          "training.lr_scheduler_type is not warmup_stable_decay"),
    _EffectRule(["training.eval_rows", "training.per_device_eval_batch_size"],
          lambda r: r.training.eval_steps is not None or r.stages.enabled, "training.eval_steps is not set"),
)  # fmt: skip


def without_effect(recipe: Recipe) -> list[str]:
    """A sentence for each reason why keys of the recipe have no effect."""
    changed = list(_changed(recipe, ""))
    told = []
    for rule in _RULES:
        if rule.counts(recipe):
            continue
        sections = tuple(key for key in rule.keys if key.endswith("."))
        keys = [key for key in changed if key in rule.keys or key.startswith(sections)]
        if keys:
            told.append(f"{', '.join(keys)} {'has' if len(keys) == 1 else 'have'} no effect: {rule.why}")
    return told


def _changed(section: Section, prefix: str) -> Iterator[str]:
    """Dotted keys whose value is not the default."""
    for name, field in type(section).model_fields.items():
        value, usual = getattr(section, name), field.get_default(call_default_factory=True)
        if isinstance(value, Section) and isinstance(usual, Section):
            yield from _changed(value, f"{prefix}{name}.")
        elif value != usual:
            yield f"{prefix}{name}"
