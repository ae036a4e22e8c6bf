"""Can this student be trained, and can this teacher teach it? Asked before anything runs."""

from typing import Any

from limbeck.compression.plan import CompressionPlan, planned_config
from limbeck.config import LossConfig, ModelSource, Recipe
from limbeck.data.dataset import PackedDataset
from limbeck.data.tokenizer import LoadedTokenizer, load_tokenizer, recipe_tokenizer
from limbeck.errors import ConfigError, LimbeckError, MismatchError
from limbeck.models import require_causal, require_packing
from limbeck.optim.groups import build_groups
from limbeck.optim.schedules import schedule_arguments
from limbeck.registry import OBJECTIVES
from limbeck.students.build import build_student
from limbeck.students.outline import outline_of
from limbeck.teachers.base import Teacher
from limbeck.training.settle import settled
from limbeck.training.ternarisation import check_warmup

_SMALL = 50_000_000  # parameters of a new student that is made and asked in a moment


def check_teacher(teacher: Teacher, loss: LossConfig, attention: str, train_dataset: Any) -> None:
    """Refuse before anything runs what a teacher could not give later.

    Raises:
        ConfigError: a temperature of the loss is not declared, or the attention is another.
        MismatchError: it was made for other rows.
    """
    missing = loss.undeclared(teacher.temperatures)
    if missing is not None:
        raise ConfigError(
            f"loss.{missing[0]} is {missing[1]} and the teacher declares {list(teacher.temperatures)}. "
            "Use a declared temperature, or declare it in teacher.temperatures and make the targets again."
        )
    sampled_at, initial = teacher.template().sampling_temperature, loss.temperature_initial
    if sampled_at is not None and initial not in (None, sampled_at):
        raise ConfigError(
            f"loss.temperature_initial is {initial} and the targets' tail was sampled at "
            f"{sampled_at}. Keep the temperature, or use teacher.top_k instead of teacher.sampling."
        )
    if isinstance(train_dataset, PackedDataset):
        teacher.check(train_dataset)
    if teacher.attention not in (None, attention):
        raise ConfigError(f"the teacher's attention is {teacher.attention} and the student's {attention}.")


def check_student(recipe: Recipe) -> None:
    """Refuse before any stage has run what the training would refuse after all those before it.

    Raises:
        ConfigError: the student's architecture, vocabulary, context, ternary weights, documents in rows, or the
            optimizer's rules cannot be as the recipe says.
        MismatchError: pretrained weights have another vocabulary than the data.
    """
    section = recipe.student
    _require_teacher_at_hand(recipe)
    student, tokenizer = planned_student(recipe)
    if tokenizer is not None and section.source is not None:
        _require_vocabulary(section.source, tokenizer)
    if student is None:
        return
    chosen, rules = settled(recipe), recipe.parameter_lr_multipliers
    build_groups(student, chosen.optimizer, chosen.learning_rate, recipe.training.weight_decay, rules)
    if recipe.training.max_steps > 0:  # else it is known once the rows are counted
        check_lengths(recipe, recipe.training.max_steps)
    if section.model is None and tokenizer is not None and _parameters_in(student) <= _SMALL:
        made = build_student(section.model_copy(update={"ternary": None}), tokenizer.model_keys, recipe.seed)
        require_causal(made, "student")
        if recipe.dataset.attention == "per_document":
            require_packing(made, "student")


def _require_teacher_at_hand(recipe: Recipe) -> None:
    """Refuse objectives that look into the teacher where its targets come from elsewhere."""
    teacher = recipe.teacher
    for entry in recipe.loss.objectives if recipe.distils else ():
        if OBJECTIVES.get(entry.name).reads_teacher and (teacher.reads_cache or teacher.is_remote):
            where = "from a cache" if teacher.reads_cache else "over HTTP"
            raise ConfigError(
                f"loss.objectives names {entry.name}, which looks into the teacher, and its targets come {where}. Run "
                "it in this process: teacher.model with teacher.use_cached_logits: false."
            )


def check_lengths(recipe: Recipe, steps: int) -> None:
    """Refuse warm-ups and decays that do not fit into a training of so many steps.

    Raises:
        ConfigError: names both lengths.
    """
    training, ternary = recipe.training, recipe.student.ternary
    check_warmup(ternary.warmup_steps if ternary else 0, steps)
    schedule_arguments(training.lr_scheduler_type, steps, training.warmup_steps, **training.schedule.model_dump())


def planned_student(recipe: Recipe) -> tuple[Any | None, LoadedTokenizer | None]:
    """The student without weights (`outline_of`), and its tokenizer where that is there already."""
    tokenizer = None if recipe.tokenizer.train_vocab_size is not None else recipe_tokenizer(recipe)
    keys = {} if tokenizer is None else tokenizer.model_keys
    if recipe.compress is None:
        return outline_of(recipe.student, keys, recipe.dataset.max_length), tokenizer
    planned = planned_config(CompressionPlan.of(recipe.compress, recipe.compress_source))
    if planned is None:  # what its layers become is found out by compressing them
        return None, tokenizer
    return outline_of(recipe.student, keys, recipe.dataset.max_length, planned), tokenizer


def _require_vocabulary(source: ModelSource, tokenizer: LoadedTokenizer) -> None:
    """Pretrained weights know the ids of their own tokenizer; where they come with one, it has the data's ids."""
    try:
        own = load_tokenizer(*source)
    except LimbeckError:
        return  # weights alone
    one, other = own.hf.get_vocab(), tokenizer.hf.get_vocab()
    differ = [token for token, number in one.items() if other.get(token, number) != number or token not in other]
    if len(differ) > max(len(one), len(other)) // 100:  # a few added tokens are no other vocabulary
        raise MismatchError(
            f"student.model {source.name} was trained with ids of its own tokenizer, and the data have those of "
            f"{tokenizer.name}: {len(differ):,} of {len(one):,} tokens differ (the first: {differ[0]!r}). Choose a "
            "student of the teacher's vocabulary, or describe a new one in student.config."
        )


def describe_student(recipe: Recipe) -> str:
    """Its class, its size, and the memory that training takes beside activations."""
    student, _ = planned_student(recipe)
    if student is None:
        return f"student of {recipe.student.builder or 'compress.method auto'}"
    count = _parameters_in(student)
    # float32 weights, gradients, and one or two moments of the optimizer
    return f"{type(student).__name__}, {count:,} parameters, about {16 * count / 1e9:.2g} GB beside activations"


def _parameters_in(student: Any) -> int:
    return sum(parameter.numel() for parameter in student.parameters())
