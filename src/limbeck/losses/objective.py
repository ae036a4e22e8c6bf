"""What a student is trained on: a sum of objectives, each of which gives a loss and what it measured.

The one idea: an objective sees what leaves the model's body (the last hidden states, the head above them, what the
routers decided) and a batch, and gives `(loss, metrics)`. The loss is divided by the positions of the whole
accumulated, data-parallel batch, so that micro-batches and ranks add up; metrics are sums over this micro-batch's
positions, averaged when they are logged, under the names the objective gives them.

Shapes: B rows, T positions, D width, V vocabulary, E experts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch

from limbeck.config import LossConfig
from limbeck.data.dataset import IGNORE
from limbeck.errors import ConfigError
from limbeck.losses.router import Routing
from limbeck.models import LogitTransform
from limbeck.registry import OBJECTIVES
from limbeck.targets.reference import Reference
from limbeck.targets.sparse import SparseTargets

Tensor = torch.Tensor
#: A step after which no ramp changes anything: that of an evaluation.
AFTER_ALL_RAMPS = 1 << 60


@dataclass(frozen=True)
class Batch:
    """What a micro-batch asks of the student.

    Attributes:
        labels: `[B, T]` the next token of each position; -100 carries no loss.
        targets: the teacher's, leading shape `[B, T]`, or None.
        num_items: positions of the whole accumulated, data-parallel batch; None: those here.
        step: the optimizer step, 0 being the first, for what is ramped.
        reference: the teacher's whole distributions, where an evaluation has them.
        routings: what the teacher's routers decided, where an objective has asked for it.
    """

    labels: Tensor
    targets: SparseTargets | None = None
    num_items: Tensor | float | None = None
    step: int = AFTER_ALL_RAMPS
    reference: Reference | None = None
    routings: Sequence[Routing] | None = None

    @cached_property
    def valid(self) -> Tensor:
        """`[B, T]` True for positions that carry loss."""
        return self.labels != IGNORE

    @cached_property
    def positions(self) -> Tensor:
        """Number of positions that carry loss; metrics are summed over them."""
        return self.valid.sum()

    @property
    def share(self) -> Tensor:
        """What a mean over this micro-batch's positions is multiplied by to be its part of the whole batch's mean."""
        return self.positions / (self.positions.clamp_min(1) if self.num_items is None else self.num_items)


@dataclass(frozen=True)
class Outputs:
    """What the student made of a batch.

    Attributes:
        hidden: `[B, T, D]` what the head is given.
        head: the output embedding, with `weight` `[V, D]` and perhaps `bias` `[V]`.
        transform: what happens to the head's output.
        routings: what each layer's router decided; none without routed experts.
        router_problem: why the routers cannot be read, if they cannot.
        model: the student.
    """

    hidden: Tensor
    head: Any
    transform: LogitTransform
    routings: Sequence[Routing] = ()
    router_problem: str | None = None
    model: Any = None

    def logits(self) -> Tensor:
        """All logits `[B, T, V]`: for small batches, or to differentiate twice."""
        made: Tensor = self.transform(
            torch.nn.functional.linear(self.hidden, self.head.weight, getattr(self.head, "bias", None))
        )
        return made


Metrics = Mapping[str, Tensor]
#: Names in a log line that are not an objective's to give.
RESERVED = ("tokens", "loss", "perplexity", "divergence", "grad_norm", "learning_rate", "epoch", "alpha", "temperature")


class Objective(torch.nn.Module):
    """One term of the loss; a module, so that it may own parameters, which are trained and saved with the student.

    Attributes:
        reads_teacher: it looks into the teacher's model, which has to be in this process.

    Register one with `@OBJECTIVES.register("name")` and name it in `loss.objectives`.
    """

    reads_teacher: ClassVar[bool] = False

    @classmethod
    def create(cls, parameters: Mapping[str, Any], context: "Context") -> "Objective":
        """Make it from what the recipe gives beside its name; `context` tells the sizes of student and teacher."""
        try:
            return cls(**parameters)
        except TypeError as error:
            raise ConfigError(f"loss.objectives: {error}") from None

    def forward(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Metrics]:
        """The loss, a scalar as its part of the whole batch's mean, and metrics by name: sums over the positions here.

        A metric of shape `[E]` is logged as NAME/000, NAME/001 and so on, one of `[L, E]` as NAME/000/000. Every
        micro-batch gives the same names, 0 where there is nothing: ranks add them up together.
        """
        raise NotImplementedError

    def exact(self, outputs: Outputs, batch: Batch) -> Tensor:
        """The same loss in a form that can be differentiated twice."""
        return self(outputs, batch)[0]  # type: ignore[no-any-return]

    def scheduled(self, step: int) -> dict[str, float]:
        """What of its settings changes with the optimizer step, by name, for the log."""
        return {}


@dataclass(frozen=True)
class Context:
    """What an objective may be made from: the recipe's section, the student and the teacher."""

    loss: LossConfig
    student: Any = None
    teacher: Any = None

    @property
    def temperatures(self) -> tuple[float, ...]:
        """Those that the teacher declares; none without one."""
        return tuple(self.teacher.temperatures) if self.teacher is not None else ()


class Objectives(torch.nn.Module):
    """The weighted sum of objectives.

    Attributes:
        terms: weights and objectives.
    """

    def __init__(self, terms: Sequence[tuple[float, Objective]]) -> None:
        super().__init__()
        self.terms = list(terms)
        self.parts = torch.nn.ModuleList(objective for _, objective in terms)

    @classmethod
    def of(cls, context: Context) -> "Objectives":
        """What every run has (cross-entropy with the divergence, routers, halting heads), and `loss.objectives`."""
        always = ("distillation", "routers", "halting")
        chosen: list[tuple[float, str, dict[str, Any]]] = [(1.0, name, {}) for name in always]
        for entry in context.loss.objectives:
            if entry.name in [name for _, name, _ in chosen]:
                raise ConfigError(f"loss.objectives names {entry.name!r}, which is there already; remove it.")
            chosen.append((entry.weight, entry.name, entry.parameters))
        return cls([(weight, OBJECTIVES.get(name).create(given, context)) for weight, name, given in chosen])

    def forward(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Σ weight · loss, and everybody's metrics.

        Raises:
            ConfigError: two objectives give one name to a metric, or one gives a name that is the trainer's.
        """
        total = outputs.hidden.new_zeros((), dtype=torch.float32)
        metrics: dict[str, Tensor] = {}
        for weight, objective in self.terms:
            loss, measured = objective(outputs, batch)
            total = total + (loss if weight == 1.0 else weight * loss)
            for name, value in measured.items():
                if name in RESERVED:
                    raise ConfigError(
                        f"{type(objective).__name__} measures {name!r}, which the trainer logs; rename it."
                    )
                if name in metrics:
                    raise ConfigError(
                        f"two objectives measure {name!r} ({type(objective).__name__} is one); rename it."
                    )
                metrics[name] = value.detach()
        return total, metrics

    def exact(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Σ weight · loss, twice differentiable."""
        return torch.stack([weight * objective.exact(outputs, batch) for weight, objective in self.terms]).sum()

    def scheduled(self, step: int) -> dict[str, float]:
        """Everybody's scheduled settings at an optimizer step."""
        return {name: value for _, objective in self.terms for name, value in objective.scheduled(step).items()}
