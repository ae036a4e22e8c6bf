"""`optimizer.name: auto`: the algorithm and the rates for a student, by whether it is new and by its width.

The one idea: what was measured to be best is chosen, with rates that are known at one width and scaled from there; a
rate that the recipe gives is one of AdamW's, and AdamW it is then. docs/log.md has the measurements.

Muon's rate is the same for every width: its update of a matrix has the same size, as operator, whatever the matrix's
shape. AdamW's rates beside it, which train embeddings, heads and vectors, fall with the square root of the width.
"""

import math
from dataclasses import dataclass

from limbeck.config.training import OptimizerConfig

#: Hidden size at which the rates below were measured.
_WIDTH = 256


@dataclass(frozen=True)
class Choice:
    """What `auto` stands for.

    Attributes:
        optimizer: with a name and AdamW's rate.
        learning_rate: of hidden matrices.
        why: one line for the person.
    """

    optimizer: OptimizerConfig
    learning_rate: float
    why: str


@dataclass(frozen=True)
class _Measured:
    muon: float
    adamw: float


_NEW = _Measured(muon=0.02, adamw=8e-3)
_PRETRAINED = _Measured(muon=5e-3, adamw=3e-3)


def choose(optimizer: OptimizerConfig, learning_rate: float | None, *, new: bool, width: int | None) -> Choice:
    """The optimizer for a student.

    Args:
        optimizer: the recipe's section, whose name is auto.
        learning_rate: `training.learning_rate`, where it is given.
        new: the student starts from random weights.
        width: its hidden size; None where its config does not say.
    """
    if learning_rate is not None:
        why = (
            f"optimizer.name auto: AdamW, as training.learning_rate is given ({learning_rate:g}); without it Muon + "
            "AdamW with rates for this student"
        )
        return Choice(optimizer.model_copy(update={"name": "adamw"}), learning_rate, why)
    measured = _NEW if new else _PRETRAINED
    rate = measured.adamw * math.sqrt(_WIDTH / (width or _WIDTH))
    rate = float(f"{rate:.2g}")  # two digits are all that is known
    adamw = optimizer.adamw.model_copy(update={"learning_rate": optimizer.adamw.learning_rate or rate})
    chosen = optimizer.model_copy(update={"name": "muon_adamw", "adamw": adamw})
    kind = "new" if new else "pretrained"
    why = (
        f"optimizer.name auto: Muon at {measured.muon:g} for hidden matrices and AdamW at {adamw.learning_rate:g} for "
        f"the rest, as the student is {kind} and {width or '?'} wide"
    )
    return Choice(chosen, measured.muon, why)
