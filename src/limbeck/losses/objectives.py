"""The package's own objectives: cross-entropy with the divergence to the teacher, and the routers' losses.

distillation = (1−α)·CE + α·τ²·D(teacher, student)
routers      = load_balance · balance + router_aux · (z or entropy)
"""

from collections.abc import Mapping
from typing import Any

import torch

from limbeck.config import LossConfig
from limbeck.errors import ConfigError
from limbeck.losses.dense import dense_distillation_loss
from limbeck.losses.divergences import same_width, whole_kl
from limbeck.losses.fused import FusedLossOutput, fused_distillation_loss
from limbeck.losses.objective import Batch, Context, Metrics, Objective, Outputs
from limbeck.losses.router import router_losses
from limbeck.models import OutputHead
from limbeck.optim.schedules import Ramp
from limbeck.registry import DIVERGENCES, OBJECTIVES

Tensor = torch.Tensor


@OBJECTIVES.register("distillation")
class Distillation(Objective):
    """(1−α)·CE + α·τ²·D, fused over chunks of positions; plain cross-entropy where a batch has no targets.

    Args:
        config: the recipe's `loss` section.
        temperatures: those that the teacher declares, which a ramp of τ goes by.
    """

    def __init__(self, config: LossConfig, temperatures: tuple[float, ...] = ()) -> None:
        super().__init__()
        self.config = config
        self.divergence = DIVERGENCES.build(config.divergence)
        alpha, tau = config.end("alpha"), config.end("temperature")
        start = tau if config.temperature_initial is None else config.temperature_initial
        levels = tuple(value for value in temperatures if min(start, tau) <= value <= max(start, tau))
        self.alpha = Ramp(alpha if config.alpha_initial is None else config.alpha_initial, alpha,
                          config.alpha_warmup_steps)  # fmt: skip
        self.temperature = Ramp(start, tau, config.temperature_warmup_steps, levels)

    @classmethod
    def create(cls, parameters: Mapping[str, Any], context: Context) -> "Distillation":
        """From the whole section."""
        return cls(context.loss, context.temperatures)

    def scheduled(self, step: int) -> dict[str, float]:
        """α and τ."""
        return {"alpha": self.alpha.at(step), "temperature": self.temperature.at(step)}

    def forward(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Metrics]:
        """`ce_loss`, and with targets `kl_loss` (D), the masses on the support, and `top1_agreement`."""
        parts = self.fused(outputs, batch, **self.scheduled(batch.step), divergence=self.divergence)
        metrics = {"ce_loss": parts.ce_sum}
        if batch.targets is not None:
            metrics |= {
                "kl_loss": parts.divergence_sum,
                "teacher_mass": parts.teacher_mass,
                "student_mass": parts.student_mass,
                "top1_agreement": parts.top1_matches,
            }
        return parts.loss, metrics

    def fused(self, outputs: Outputs, batch: Batch, **settings: Any) -> FusedLossOutput:
        """The fused loss of the outputs with other settings than the recipe's."""
        return fused_distillation_loss(
            outputs.hidden,
            outputs.head.weight,
            batch.labels,
            batch.targets,
            bias=getattr(outputs.head, "bias", None),
            logit_scale=outputs.transform.scale,
            logit_softcap=outputs.transform.softcap,
            num_items=batch.num_items,
            **{"tail": self.config.tail, "chunk_size": self.config.chunk_size, **settings},
        )

    def exact(self, outputs: Outputs, batch: Batch) -> Tensor:
        """The formula written out over all logits."""
        settings: dict[str, Any] = {**self.scheduled(batch.step), "divergence": self.divergence}
        loss = dense_distillation_loss(outputs.logits(), batch.labels, batch.targets, tail=self.config.tail, **settings)
        return loss * batch.share


@OBJECTIVES.register("routers")
class RouterObjective(Objective):
    """Load balance and the brake on the routers' logits over the positions that carry loss; 0 without routers."""

    def __init__(self, config: LossConfig) -> None:
        super().__init__()
        self.config = config

    @classmethod
    def create(cls, parameters: Mapping[str, Any], context: Context) -> "RouterObjective":
        """From the whole section."""
        return cls(context.loss)

    def forward(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Metrics]:
        """The losses and what the routers do.

        `load_balance_loss`, `router_aux_loss`; `expert_load` `[E]`, each expert's share of the assignments over all
        layers, and `layer_load` `[L, E]` of each layer, where those are few; `router_entropy` `[L]` in nats.

        Raises:
            ConfigError: a weight is set and the routers cannot be read, or have no gradient.
        """
        config, routings = self.config, outputs.routings
        weighted = bool(config.load_balance or config.router_aux)
        if outputs.router_problem is not None and weighted:
            raise ConfigError(
                f"loss.load_balance is {config.load_balance:g} and loss.router_aux {config.router_aux:g}, and the "
                f"student's routers cannot be read: {outputs.router_problem}. Set both to 0."
            )
        if not routings:
            return outputs.hidden.new_zeros((), dtype=torch.float32), {}
        if weighted:
            _require_gradient(outputs)
        found = router_losses(routings, batch.valid, config.router_aux_kind)
        loss = (config.load_balance * found.load_balance + config.router_aux * found.aux) * batch.share
        count = batch.positions.double()
        metrics = {
            "load_balance_loss": found.load_balance * count,
            "router_aux_loss": found.aux * count,
            "router_entropy": found.entropy.double() * count,
            "expert_load": found.load.double().mean(dim=0) * count,
        }
        if found.load.numel() <= _MOST_LOADS:
            metrics["layer_load"] = found.load.double() * count
        return loss, metrics


def _require_gradient(outputs: Outputs) -> None:
    if not torch.is_grad_enabled() or any(routing.logits.requires_grad for routing in outputs.routings):
        return
    model = outputs.model
    if getattr(model, "is_gradient_checkpointing", False) and any(p.requires_grad for p in model.parameters()):
        raise ConfigError(
            "gradient_checkpointing_kwargs.use_reentrant is true, and the routers' losses then have no gradient. Set "
            "it to false, or loss.load_balance and loss.router_aux to 0."
        )


_SCORE_BYTES = 32 << 20
_MOST_LOADS = 1024  # shares in a log line: of all layers' experts together


class KLToTeacher(Objective):
    """No loss; measures KL(teacher ‖ student) at temperature 1, whatever is trained, as `kl_to_teacher`.

    Over the whole vocabulary where the batch has a reference, else over the stored ids and the tail. Nothing where
    sampled targets belong to another temperature.

    Args:
        distillation: whose head walk is used for stored ids.
    """

    def __init__(self, distillation: Distillation) -> None:
        super().__init__()
        self._fused = distillation.fused

    @torch.no_grad()
    def forward(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Metrics]:
        """`kl_to_teacher`, summed in nats."""
        nothing = outputs.hidden.new_zeros((), dtype=torch.float32)
        targets, reference = batch.targets, batch.reference
        if reference is None:
            if targets is None or targets.sampling_temperature not in (None, 1.0):
                return nothing, {}
            parts = self._fused(outputs, batch, temperature=1.0, tail="bucket")
            return nothing, {"kl_to_teacher": parts.divergence_sum}
        head, flat = OutputHead(outputs.model), outputs.hidden.reshape(-1, outputs.hidden.shape[-1])
        positions = batch.valid.reshape(-1).nonzero().squeeze(-1)
        total = torch.zeros((), dtype=torch.float64, device=flat.device)
        for part in torch.split(positions, head.positions_in(_SCORE_BYTES)):
            log_p = reference.log_probs(part).to(flat.device)
            if log_p.shape[-1] > head.vocab_size:  # ids that stand for no token of the student's, as in its targets
                log_p = log_p[..., : head.vocab_size].log_softmax(dim=-1)
            total += whole_kl(*same_width(log_p, head.log_probs(flat[part])))
        return nothing, {"kl_to_teacher": total}
