"""Learning-rate schedules by transformers' own functions, and linear ramps of the loss's settings.

The one idea: both are pure functions of the step, so a resumed run finds them where they were.
"""

from dataclasses import dataclass
from typing import Any

from limbeck.errors import ConfigError

#: training.lr_scheduler_type -> transformers' name and the shape of its decay.
SCHEDULES = {
    "linear": ("linear", "linear"),
    "cosine": ("cosine", "cosine"),
    "constant": ("constant_with_warmup", None),
    "constant_with_warmup": ("constant_with_warmup", None),
    "warmup_stable_decay": ("warmup_stable_decay", None),
}


def schedule_arguments(
    kind: str, total: int, warmup: int, *, decay_ratio: float, decay_type: str, min_lr_ratio: float
) -> tuple[str, dict[str, Any]]:
    """The name and special keywords that `transformers.get_scheduler` takes for a schedule.

    Args:
        kind: linear, cosine, constant or warmup_stable_decay.
        total: optimizer steps of the run.
        warmup: steps of linear warm-up.
        decay_ratio: share of `total` that warmup_stable_decay spends going down.
        decay_type: its shape: linear, cosine or 1-sqrt.
        min_lr_ratio: where a decay ends, as a share of the peak.

    Raises:
        ConfigError: warm-up and decay do not fit into the run.
    """
    name, shape = SCHEDULES[kind]
    decay = max(1, round(decay_ratio * total)) if kind == "warmup_stable_decay" else 0
    if warmup + decay > total:
        after = f" and decay of {decay} steps (training.decay_ratio {decay_ratio})" if decay else ""
        raise ConfigError(
            f"training.warmup_steps is {warmup}{after} and the run has {total} steps. Train longer, or shorten them."
        )
    if kind == "warmup_stable_decay":
        return name, {"num_decay_steps": decay, "decay_type": decay_type, "min_lr_ratio": min_lr_ratio}
    if shape is not None and min_lr_ratio > 0.0:  # a decay that starts right after the warm-up
        arguments = {"num_decay_steps": total - warmup, "decay_type": shape, "min_lr_ratio": min_lr_ratio}
        return "warmup_stable_decay", arguments
    return name, {}


def build_schedule(optimizer: Any, kind: str, total: int, warmup: int, **shape: Any) -> Any:
    """transformers' schedule behind a warm-up from 0; arguments of `schedule_arguments`.

    Its own warm-up begins at `min_lr_ratio`, as if that were a share of every rate and not where a decay ends.
    """
    import torch
    from transformers import get_scheduler

    name, special = schedule_arguments(kind, total, warmup, **shape)
    stand_in = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    after = get_scheduler(name, stand_in, 0, max(total - warmup, 1), scheduler_specific_kwargs=special).lr_lambdas[0]

    def factor(step: int) -> float:
        return step / warmup if step < warmup else float(after(step - warmup))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


@dataclass(frozen=True)
class Ramp:
    """A value that goes linearly from `initial` to `final` over `steps` steps and stays there.

    Attributes:
        levels: when given, the values it may take: the nearest one is used (a teacher's declared temperatures).
    """

    initial: float
    final: float
    steps: int
    levels: tuple[float, ...] = ()

    def at(self, step: int) -> float:
        """The value at an optimizer step, 0 being the first."""
        if self.steps <= 0 or step >= self.steps:
            return self.final
        value = self.initial + (self.final - self.initial) * step / self.steps
        return min(self.levels, key=lambda level: (abs(level - value), level)) if self.levels else value

    def values(self) -> tuple[float, ...]:
        """Every value it takes, when it has levels."""
        return tuple(sorted({self.at(step) for step in range(self.steps + 1)}))
