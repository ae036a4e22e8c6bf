"""The parameters that objectives own, beside the student's: their gradients, and where they are kept.

The one idea: accelerate wraps, clips and saves the student alone; these are few, so that they are averaged over ranks
by hand, clipped by their own norm, and kept in a file of their own in every checkpoint.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from limbeck.errors import CorruptError

FILE = "objectives.safetensors"


class OwnParameters(TrainerCallback):
    """Steps the parameters of a trainer's objectives as the Trainer steps the student's."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def _parameters(self) -> list[torch.nn.Parameter]:
        return [p for p in self._trainer.objectives.parameters() if p.requires_grad]

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Average the gradients over ranks, as DDP does, and clip them."""
        own = [p for p in self._parameters() if p.grad is not None]
        if not own:
            return
        if args.world_size > 1:
            for parameter in own:
                parameter.grad = self._trainer.accelerator.reduce(parameter.grad, reduction="mean")
        if args.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(own, args.max_grad_norm)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The Trainer clears the student's gradients alone."""
        for parameter in self._parameters():
            parameter.grad = None


def save_own(objectives: torch.nn.Module, folder: Path) -> None:
    """Write what the objectives hold into a checkpoint; nothing where they hold nothing."""
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in objectives.state_dict().items()}
    if held:
        save_file(held, folder / FILE)


def load_own(objectives: torch.nn.Module, folder: Path) -> None:
    """The inverse of `save_own`.

    Raises:
        CorruptError: the checkpoint does not hold exactly what the objectives have.
    """
    wanted, path = set(objectives.state_dict()), folder / FILE
    held = load_file(path) if path.is_file() else {}
    if set(held) != wanted:
        found = ", ".join(sorted(set(held) ^ wanted)[:3])
        raise CorruptError(
            f"{folder} holds {len(held)} tensors of objectives and this run's have {len(wanted)} ({found}). Continue "
            "with the objectives it was trained with (loss.objectives), or start over with --force."
        )
    objectives.load_state_dict(held)
