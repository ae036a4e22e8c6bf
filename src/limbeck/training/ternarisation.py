"""Ternary weights while they are trained: the warm-up of λ, and what became of the codes.

The one idea: λ is a function of the step; evaluation always uses λ = 1, because that is the model that
checkpoints hold.
"""

from typing import Any

import torch
from transformers import TrainerCallback

from limbeck.errors import ConfigError
from limbeck.students.ternary import TernaryState, quantise, ternary_weights


def check_warmup(steps: int, total: int) -> None:
    """Refuse a warm-up that a run never finishes.

    Raises:
        ConfigError: names both lengths.
    """
    if steps > total:
        raise ConfigError(
            f"student.ternary.warmup_steps is {steps} and the run has {total} steps: its weights would never be "
            "wholly ternary. Train longer, or shorten the warm-up."
        )


class TernaryWatch(TrainerCallback):
    """Sets λ at each step, and measures zeros and flips between log lines.

    Args:
        model: the student; has `ternary_state`.
        warmup_steps: steps in which λ rises from 0 to 1.

    Attributes:
        measures: the codes of before are held, so that what changed can be told.
    """

    measures = True

    def __init__(self, model: Any, warmup_steps: int) -> None:
        self._model, self._warmup = model, warmup_steps
        self.state: TernaryState = model.ternary_state
        self._codes: dict[str, torch.Tensor] = {}

    def mix_at(self, step: int) -> float:
        """λ of an optimizer step, 0 being the first."""
        return min(1.0, step / self._warmup) if self._warmup else 1.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse a warm-up that the run never finishes; note the codes it starts from."""
        check_warmup(self._warmup, state.max_steps)
        if self.measures:
            self._codes = {name: self._quantised(weight) for name, weight in ternary_weights(self._model)}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """λ of the step that begins."""
        self.state.mix = self.mix_at(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What is left is ternary."""
        self.state.mix = 1.0

    def _quantised(self, weight: torch.Tensor) -> torch.Tensor:
        return quantise(weight, self.state.group_size, self.state.scale).codes

    def measure(self) -> dict[str, float]:
        """Share of zero codes now, and of codes that changed since the last call, by weight and in all."""
        logs: dict[str, float] = {}
        zeros = flips = count = 0
        for name, weight in ternary_weights(self._model):
            codes = self._quantised(weight)
            before = self._codes.get(name)
            changed = int((codes != before).sum()) if before is not None else 0
            empty = int((codes == 0).sum())
            short = name.removesuffix(".weight")
            logs[f"ternary_zeros/{short}"] = empty / codes.numel()
            logs[f"ternary_flips/{short}"] = changed / codes.numel()
            self._codes[name] = codes
            zeros, flips, count = zeros + empty, flips + changed, count + codes.numel()
        return {
            "ternary_mix": self.state.mix,
            "ternary_zeros": zeros / count,
            "ternary_flips": flips / count,
            **logs,
        }
