"""The parameters that objectives own, beside the student's: their gradients, and where they are kept.

The one idea: accelerate wraps, clips and saves the student alone; these are few, so that they are averaged over ranks
by hand, clipped by their own norm, and kept in a file of their own in every checkpoint.
"""

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from limbeck.errors import ConfigError
from limbeck.training.guard import DivergedError

FILE = "objectives.safetensors"


class OwnParameters(TrainerCallback):
    """Steps the parameters of a trainer's objectives as the Trainer steps the student's."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def _parameters(self) -> list[torch.nn.Parameter]:
        return [p for p in self._trainer.objectives.parameters() if p.requires_grad]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """All ranks begin alike.

        Raises:
            ConfigError: the student is sharded, or gradients are scaled for float16.
        """
        own = self._parameters()
        if not own:
            return
        if self._trainer.is_fsdp_enabled or args.fp16:
            what = "the student is sharded (FSDP)" if self._trainer.is_fsdp_enabled else "training.fp16 is true"
            raise ConfigError(
                f"an objective of loss.objectives owns parameters and {what}, which its parameters cannot follow. Use "
                "DDP with bf16 or float32, or an objective without parameters."
            )
        if args.world_size > 1:
            for parameter in own:
                parameter.data = broadcast(parameter.data)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Average the gradients over ranks, as DDP does, and clip them.

        Raises:
            DivergedError: they are not finite.
        """
        own = self._parameters()
        if not own:
            return
        if args.world_size > 1:
            for parameter in own:  # every rank reduces every one, used in its micro-batches or not
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self._trainer.accelerator.reduce(gradient, reduction="mean")
        norm = torch.nn.utils.clip_grad_norm_(own, args.max_grad_norm or float("inf"))
        if not bool(torch.isfinite(norm)):
            raise DivergedError(
                f"step {state.global_step + 1}: the gradient of the objectives' own parameters is {float(norm)}, so "
                "training stops before anything is updated or saved over. Lower the objective's weight."
            )

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
        ConfigError: the checkpoint does not hold exactly what the objectives have.
    """
    path = folder / FILE
    held = load_file(path) if path.is_file() else {}
    shapes, wanted = ({name: tuple(tensor.shape) for name, tensor in tensors.items()}
                      for tensors in (held, objectives.state_dict()))  # fmt: skip
    if shapes != wanted:
        differ = sorted(name for name in {*shapes, *wanted} if shapes.get(name) != wanted.get(name))
        first = f"{differ[0]}: {shapes.get(differ[0])} there, {wanted.get(differ[0])} here"
        raise ConfigError(
            f"the objectives of {folder} are not this run's ({first}). Continue with the objectives it was trained "
            "with (loss.objectives), or start over with --force."
        )
    objectives.load_state_dict(held)
