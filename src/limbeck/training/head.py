"""The fused loss inside any Hugging Face causal LM's own forward.

The one idea: while a loss is asked for, the output embedding's forward computes the fused loss from the
hidden states it is given and its own weight, and hands the scalar up through the model. So the head is
reached inside the wrapped model (DDP's hooks run, FSDP2 has the weight gathered), no model code is copied,
and no [B, T, V] logits exist. What the model does to logits after the head (scale, soft-cap) is read from
its config and verified once against the model's own logits.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers.modeling_outputs import CausalLMOutput

from limbeck.data.dataset import IGNORE
from limbeck.errors import ConfigError
from limbeck.losses.divergences import same_width, whole_kl
from limbeck.losses.fused import FusedLossOutput, fused_distillation_loss
from limbeck.losses.router import RouterLosses, RouterTap, Routing, router_losses
from limbeck.models import LogitTransform, OutputHead, head_replaced, verified_transform
from limbeck.targets.sparse import SparseTargets
from limbeck.teachers.base import Reference


@dataclass(frozen=True)
class LossRequest:
    """What the forward needs to return a loss.

    Attributes:
        labels: `[B, T]` the next token of each position.
        targets: the teacher's, or None.
        settings: keywords of `fused_distillation_loss`.
        router: weights (load balance, auxiliary) and the auxiliary's kind.
        num_items: divisor of the sums.
        scores_kl: also give KL(teacher ‖ student) at temperature 1.
        reference: the teacher's whole distribution for that KL; without it that of the (K+1)-partition is given.
    """

    labels: torch.Tensor
    targets: SparseTargets | None
    settings: dict[str, Any]
    router: tuple[float, float, str] = (0.0, 0.0, "z")
    num_items: torch.Tensor | float | None = None
    scores_kl: bool = False
    reference: Reference | None = None


@dataclass
class LossOutput(CausalLMOutput):
    """A causal LM's output that carries the fused loss and its parts instead of logits.

    `kl_sum` is Σ KL(teacher ‖ student) at temperature 1 over the labelled positions, where it was asked for.
    """

    parts: FusedLossOutput | None = None
    router: RouterLosses | None = None
    kl_sum: torch.Tensor | None = None


def attach_fused_loss(model: Any) -> None:
    """Teach `model.forward` the keyword `loss_request`; without it the forward is as before.

    Raises:
        LimbeckError: the model has no linear output embedding, or changes its logits in a way that
            `LogitTransform` does not know.
    """
    tap = RouterTap(model)
    with tap.recording():
        transform = verified_transform(model)
        tap.learn()
    head = model.get_output_embeddings()
    plain_forward = model.forward

    def forward(*args: Any, loss_request: LossRequest | None = None, **kwargs: Any) -> Any:
        if loss_request is None:
            return plain_forward(*args, **kwargs)
        found: list[tuple[FusedLossOutput, torch.Tensor]] = []
        scored: list[torch.Tensor | None] = []

        def head_forward(hidden: torch.Tensor) -> torch.Tensor:
            parts = _loss(hidden, head, loss_request, transform)
            # Three dimensions, because model code slices and scales what it takes for logits.
            found.append((parts, parts.loss.reshape(1, 1, 1)))
            if loss_request.scores_kl:
                scored.append(_kl_sum(hidden, model, transform, loss_request))
            return found[0][1]

        balance, aux, kind = loss_request.router
        if tap.problem is not None and (balance or aux):
            raise ConfigError(
                f"loss.load_balance is {balance:g} and loss.router_aux {aux:g}, and the student's routers cannot be "
                f"read: {tap.problem}. Set both to 0."
            )
        with tap.recording() as routings, head_replaced(head, head_forward):
            outputs = plain_forward(*args, **{**kwargs, "use_cache": False})
        parts, carried = found[0]
        # The loss goes on from the very tensor that left the head, so that hooks on the head's output (FSDP2)
        # see the gradient.
        loss, router = carried.reshape(()), None
        if routings:
            _require_gradient(routings, model, balance or aux)
            # Over the positions that carry the loss, so that micro-batches add up to the whole batch.
            router = router_losses(routings, loss_request.labels != IGNORE, kind)
            items = parts.num_valid if loss_request.num_items is None else loss_request.num_items
            loss = loss + (balance * router.load_balance + aux * router.aux) * (parts.num_valid / items)
        kl_sum = scored[0] if scored else None
        return LossOutput(loss=loss, parts=parts, router=router, kl_sum=kl_sum, hidden_states=outputs.hidden_states)

    model.forward = forward


def _require_gradient(routings: list[Routing], model: Any, weight: float) -> None:
    if not weight or not torch.is_grad_enabled() or any(routing.logits.requires_grad for routing in routings):
        return
    if getattr(model, "is_gradient_checkpointing", False) and any(p.requires_grad for p in model.parameters()):
        raise ConfigError(
            "gradient_checkpointing_kwargs.use_reentrant is true, and the routers' losses then have no gradient. Set "
            "it to false, or loss.load_balance and loss.router_aux to 0."
        )


_SCORE_BYTES = 32 << 20


@torch.no_grad()
def _kl_sum(hidden: torch.Tensor, model: Any, transform: LogitTransform, request: LossRequest) -> torch.Tensor | None:
    """Σ KL(teacher ‖ student) at temperature 1; None where sampled targets belong to another temperature."""
    targets, reference = request.targets, request.reference
    if reference is None:
        if targets is None or targets.sampling_temperature not in (None, 1.0):
            return None
        plain = replace(request, settings={"alpha": 1.0, "temperature": 1.0})
        return _loss(hidden, model.get_output_embeddings(), plain, transform).divergence_sum
    head, flat = OutputHead(model), hidden.reshape(-1, hidden.shape[-1])
    positions = (request.labels.reshape(-1) != IGNORE).nonzero().squeeze(-1)
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    for part in torch.split(positions, max(1, _SCORE_BYTES // (4 * head.vocab_size))):
        log_p = reference.log_probs(part).to(hidden.device)
        if log_p.shape[-1] > head.vocab_size:  # ids that stand for no token of the student's, as in its targets
            log_p = log_p[..., : head.vocab_size].log_softmax(dim=-1)
        total += whole_kl(*same_width(log_p, head.log_probs(flat[part])))
    return total


def _loss(hidden: torch.Tensor, head: Any, request: LossRequest, transform: LogitTransform) -> FusedLossOutput:
    return fused_distillation_loss(
        hidden,
        head.weight,
        request.labels,
        request.targets,
        bias=getattr(head, "bias", None),
        logit_scale=transform.scale,
        logit_softcap=transform.softcap,
        num_items=request.num_items,
        **request.settings,
    )
