"""Can this teacher teach this run? Asked before anything runs."""

from typing import Any

from limbeck.config import LossConfig
from limbeck.data.dataset import PackedDataset
from limbeck.errors import ConfigError
from limbeck.teachers.base import Teacher


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
