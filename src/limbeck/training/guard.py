"""A loss that is not a number ends the run: which step, which rows, and why it probably happened.

The one idea: the check comes after the gradients and before the optimizer, so nothing is updated and nothing
is saved over; the causes are looked for in what the run itself recorded.
"""

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

from limbeck.errors import LimbeckError
from limbeck.training.checkpoints import what_remains

_LARGE = 1e4  # weights of a trained model are of the order of 1


class DivergedError(LimbeckError):
    """Loss or gradient is NaN or infinite."""


class StepGuard:
    """Watches the micro-batches of one optimizer step."""

    def __init__(self) -> None:
        self._norms: deque[float] = deque(maxlen=20)
        self._rows: list[torch.Tensor] = []
        self._losses: list[torch.Tensor] = []
        self._targets: Any = None

    def saw(self, row_ids: torch.Tensor, loss: torch.Tensor, targets: Any) -> None:
        """Remember one micro-batch until its step is taken."""
        self._rows.append(row_ids)
        self._losses.append(loss.detach())
        self._targets = targets

    def step_loss(self, device: torch.device) -> torch.Tensor:
        """This rank's share of the step's loss."""
        return torch.stack(self._losses).sum().double() if self._losses else torch.zeros((), device=device)

    def check(self, step: int, norm: float, model: torch.nn.Module, args: Any, scaled: bool) -> None:
        """Pass, or end the run.

        Args:
            step: the step that is about to be taken, counted from 1.
            norm: the gradient norm before clipping.
            model: the student.
            args: DistillationArguments.
            scaled: gradients are scaled for float16; an overflow there is the scaler's business.

        Raises:
            DivergedError: the loss, or without scaling the gradient norm, is not finite.
        """
        losses = torch.stack([loss.float() for loss in self._losses]) if self._losses else torch.zeros(0)
        loss_is_fine = bool(torch.isfinite(losses).all())
        if loss_is_fine and (math.isfinite(norm) or scaled):
            self._norms.append(norm)
            self._rows, self._losses = [], []
            return
        what = f"the gradient norm is {norm}" if loss_is_fine else f"the loss is {float(losses.sum())}"
        rows = [int(i) for ids, loss in zip(self._rows, self._losses, strict=True) for i in ids
                if loss_is_fine or not math.isfinite(float(loss))]  # fmt: skip
        causes = "; ".join(self._causes(step, model, args, loss_is_fine))
        named = f"Packed rows of this rank's batch: {rows}. " if rows else "This rank's own rows are fine. "
        raise DivergedError(
            f"step {step}: {what}, so training stops before anything is updated or saved over. {named}"
            f"Likely: {causes}. Mend that; with changed keys a run starts over ({what_remains(args.output_dir)})."
        )

    def _causes(self, step: int, model: torch.nn.Module, args: Any, loss_is_fine: bool) -> Sequence[str]:
        found = []
        rate = f"training.learning_rate is {args.learning_rate:g}, warm-up {args.warmup_steps} steps"
        if self._targets is not None and not _finite_targets(self._targets):
            found.append(
                "the teacher's targets of these rows are not finite (a damaged cache, or a teacher in float16)"
            )
        largest = max(float(p.detach().abs().max()) for p in model.parameters())
        if not math.isfinite(largest):
            found.append(
                f"the weights were already not finite after step {step - 1}: the update was too large ({rate})"
            )
        elif largest > _LARGE:
            found.append(f"the largest weight is {largest:.3g}: the updates were too large ({rate})")
        elif self._norms and max(self._norms) > 10 * min(self._norms):
            found.append(
                f"the gradient norm went from {min(self._norms):.3g} to {max(self._norms):.3g} in the last "
                f"{len(self._norms)} steps: lower the rate or lengthen the warm-up ({rate})"
            )
        if args.fp16:
            found.append("float16 overflows above 65504: use training.bf16")
        if loss_is_fine:
            found.append("the loss is finite and its gradient is not: an overflow in the backward pass")
        if args.max_grad_norm == 0:
            found.append("training.max_grad_norm is 0, so no gradient is clipped")
        return found or [f"a rate too high ({rate}), or these rows"]


def _finite_targets(targets: Any) -> bool:
    """Log-probabilities may be -inf where nothing is stored, and must not be NaN or +inf."""
    values = targets.logprobs[targets.valid]
    return bool(torch.isfinite(values).all() and torch.isfinite(targets.log_z).all())
