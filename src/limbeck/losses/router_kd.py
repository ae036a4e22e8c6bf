"""The teacher's routers as targets: for a student whose layers have the experts of the teacher's.

    loss = mean over layers and positions of KL(p_teacher ‖ p_student), p the router's distribution over the experts

The one idea: what a router decides is a distribution like any other, so it is compared as one. The student's router is
asked at the student's own hidden states, as it will be in use.

Shapes: N positions, E experts, L layers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from limbeck.errors import ConfigError
from limbeck.losses.objective import Batch, Context, Metrics, Objective, Outputs
from limbeck.losses.router import Routing, find_routers
from limbeck.registry import OBJECTIVES

Tensor = torch.Tensor


@OBJECTIVES.register("router_kd")
class RouterKD(Objective):
    """KL from the teacher's routing to the student's; `loss.objectives: [{name: router_kd, weight: 0.1}]`."""

    reads_teacher = True

    @classmethod
    def create(cls, parameters: Mapping[str, Any], context: Context) -> "RouterKD":
        """Let the teacher tell what its routers decide.

        Raises:
            ConfigError: there is no teacher in this process, it or the student has no routers that can be read, or
                their layers or experts differ.
        """
        if parameters:
            raise ConfigError(f"loss.objectives: router_kd has no parameter {next(iter(parameters))!r}; it has none.")
        if context.teacher is None:
            raise ConfigError("loss.objectives names router_kd and training.mode is ce: no teacher. Leave it out.")
        context.teacher.watch_routers()
        wanted, own = (_experts_by_layer(model) for model in (context.teacher.model, context.student))
        if wanted != own:
            raise ConfigError(
                f"loss.objectives names router_kd, and the teacher has routers over {wanted} experts, layer by layer, "
                f"the student over {own}. They must be the same; leave router_kd out for a student of other experts."
            )
        return cls()

    def forward(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Metrics]:
        """`router_kd_loss`; nothing where an evaluation has no teacher."""
        if batch.routings is None:
            return outputs.hidden.new_zeros((), dtype=torch.float32), {}
        loss = router_divergence(batch.routings, outputs.routings, batch.valid)
        return loss * batch.share, {"router_kd_loss": loss * batch.positions}


def router_divergence(wanted: Sequence[Routing], found: Sequence[Routing], valid: Tensor) -> Tensor:
    """Mean over layers and valid positions of KL(wanted ‖ found), differentiable in `found`.

    Args:
        wanted, found: one a layer, over the same experts.
        valid: `[B, T]` True for positions that count.
    """
    kept, layers = valid.reshape(-1), []
    for target, routing in zip(wanted, found, strict=True):
        log_q = routing.log_probs()[kept]
        log_p = target.log_probs().to(log_q.device)[kept]
        layers.append((log_p.exp() * (log_p - log_q)).sum(dim=-1).sum() / kept.sum().clamp_min(1))
    return torch.stack(layers).mean()


def _experts_by_layer(model: Any) -> list[int]:
    found: list[Any] = [module for module, _ in find_routers(model)]
    return [int(module.weight.shape[0]) for module in found]
