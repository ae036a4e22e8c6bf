"""`optimizer.name: auto`: the algorithm and the rates for a student, by whether it is new and by its width.

The one idea: what was measured to be best is chosen, with rates that are known at one width and scaled from there; a
rate that the recipe gives is one of AdamW's, and AdamW it is then. docs/log.md has the measurements.

A new student: Muon at one rate for every width, as its update of a matrix has the same size, as operator, whatever the
matrix's shape; beside it AdamW for embeddings, heads and vectors, at a rate that falls as the root of the width grows.
A pretrained one: AdamW at a rate that falls with the width, as the sum over a wider layer's inputs moves the more.
"""

import math
from dataclasses import dataclass

from limbeck.config.training import OptimizerConfig

#: Hidden size at which the rates below were measured.
_WIDTH = 256


@dataclass(frozen=True)
class OptimizerChoice:
    """What `auto` stands for.

    Attributes:
        optimizer: with a name and AdamW's rate.
        learning_rate: of hidden matrices.
        why: one line for the person.
    """

    optimizer: OptimizerConfig
    learning_rate: float
    why: str


_MUON, _BESIDE_MUON = 0.02, 8e-3  # of a new student
_PRETRAINED = 1e-3


def choose(optimizer: OptimizerConfig, learning_rate: float | None, *, new: bool, width: int | None) -> OptimizerChoice:
    """The optimizer for a student.

    Args:
        optimizer: the recipe's section, whose name is auto.
        learning_rate: `training.learning_rate`, where it is given.
        new: the student starts from random weights.
        width: its hidden size; None where its config does not say.
    """
    if learning_rate is not None:
        why = f"AdamW, as training.learning_rate is given ({learning_rate:g}); without it rates follow from the student"
        return OptimizerChoice(
            optimizer.model_copy(update={"name": "adamw"}), learning_rate, f"optimizer.name auto: {why}"
        )
    share = _WIDTH / (width or _WIDTH)
    kind = f"the student is {'new' if new else 'pretrained'} and {width or '?'} wide"
    if not new:
        rate = _rounded(_PRETRAINED * share)
        why = f"optimizer.name auto: AdamW at {rate:g}, as {kind}"
        return OptimizerChoice(optimizer.model_copy(update={"name": "adamw"}), rate, why)
    own = optimizer.adamw.learning_rate or _rounded(_BESIDE_MUON * math.sqrt(share))
    adamw = optimizer.adamw.model_copy(update={"learning_rate": own})
    why = f"optimizer.name auto: Muon at {_MUON:g} for hidden matrices and AdamW at {own:g} for the rest, as {kind}"
    return OptimizerChoice(optimizer.model_copy(update={"name": "muon_adamw", "adamw": adamw}), _MUON, why)


def _rounded(rate: float) -> float:
    """Two digits are all that is known of a rate."""
    return float(f"{rate:.2g}")
