"""What a halting head is taught: to say where the token that the student would choose is the teacher's own choice.

The one idea: after a segment (see `students/retnet_hrm`) a further one is worth its time only where the prediction is
still wrong, so the head learns to tell that from the hidden state alone, which is all that decoding has.

Source: HRM (arXiv 2506.21734, §2, adaptive computation), with agreement with the teacher in place of a reward.
"""

from collections.abc import Mapping
from typing import Any

import torch

from limbeck.losses.objective import Batch, Context, Metrics, Objective, Outputs
from limbeck.registry import OBJECTIVES

Tensor = torch.Tensor
_LOGIT_BYTES = 32 << 20


@OBJECTIVES.register("halting")
class Halting(Objective):
    """weight · BCE(halting logit, [argmax of the student = the teacher's likeliest id]); 0 without a halting head.

    Without a teacher the next token takes the place of its likeliest id.

    Args:
        weight: the recipe's `loss.halting`.
    """

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    @classmethod
    def create(cls, parameters: Mapping[str, Any], context: Context) -> "Halting":
        """From the recipe's section."""
        return cls(context.loss.halting)

    def forward(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Metrics]:
        """`halting_loss`, and `halted`: the share of positions at which the head would stop."""
        zero = outputs.hidden.new_zeros((), dtype=torch.float32)
        halting_logits = getattr(outputs.model, "halting_logits", None)
        logits = None if halting_logits is None else halting_logits(outputs.hidden)
        if logits is None:
            return zero, {}
        logits = logits[batch.valid].float()
        wanted = (_argmax(outputs, batch.valid) == _wanted(batch)).float()
        mean = torch.nn.functional.binary_cross_entropy_with_logits(logits, wanted) if len(logits) else logits.sum()
        count = batch.positions.double()
        return self.weight * mean * batch.share, {
            "halting_loss": mean * count,
            "halted": (logits > 0.0).sum().double(),
        }


def _wanted(batch: Batch) -> Tensor:
    """`[n]` the teacher's likeliest id at each position that carries loss, or the next token."""
    if batch.targets is None:
        return batch.labels[batch.valid]
    ids, logprobs = batch.targets.token_ids[batch.valid], batch.targets.logprobs[batch.valid]
    place = torch.where(ids >= 0, logprobs, -torch.inf).argmax(dim=-1, keepdim=True)
    return ids.gather(-1, place).squeeze(-1).long()


@torch.no_grad()
def _argmax(outputs: Outputs, valid: Tensor) -> Tensor:
    """`[n]` the student's likeliest id; a scale or soft-cap of the logits does not change which it is."""
    hidden, head = outputs.hidden[valid], outputs.head
    rows = max(1, _LOGIT_BYTES // (4 * head.weight.shape[0]))
    bias = getattr(head, "bias", None)
    parts = [torch.nn.functional.linear(part, head.weight, bias).argmax(dim=-1) for part in torch.split(hidden, rows)]
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.long)
