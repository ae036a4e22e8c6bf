"""The fused loss inside any Hugging Face causal LM's own forward.

The one idea: while a loss is asked for, the output embedding's forward computes the fused loss from the
hidden states it is given and its own weight, and hands the scalar up through the model. So the head is
reached inside the wrapped model (DDP's hooks run, FSDP2 has the weight gathered), no model code is copied,
and no [B, T, V] logits exist. What the model does to logits after the head (scale, soft-cap) is read from
its config and verified once against the model's own logits.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_outputs import CausalLMOutput

from limbeck.data.dataset import IGNORE
from limbeck.losses.fused import FusedLossOutput, fused_distillation_loss
from limbeck.losses.router import RouterLosses, router_losses, routing_top_k
from limbeck.models import LogitTransform, head_replaced, verified_transform
from limbeck.targets.sparse import SparseTargets


@dataclass(frozen=True)
class LossRequest:
    """What the forward needs to return a loss.

    Attributes:
        labels: `[B, T]` the next token of each position.
        targets: the teacher's, or None.
        settings: keywords of `fused_distillation_loss`.
        router: weights (load balance, auxiliary) and the auxiliary's kind.
        num_items: divisor of the sums.
    """

    labels: torch.Tensor
    targets: SparseTargets | None
    settings: dict[str, Any]
    router: tuple[float, float, str] = (0.0, 0.0, "z")
    num_items: torch.Tensor | float | None = None


@dataclass
class LossOutput(CausalLMOutput):
    """A causal LM's output that carries the fused loss and its parts instead of logits."""

    parts: FusedLossOutput | None = None
    router: RouterLosses | None = None


def attach_fused_loss(model: Any) -> None:
    """Teach `model.forward` the keyword `loss_request`; without it the forward is as before.

    Raises:
        LimbeckError: the model has no linear output embedding, or changes its logits in a way that
            `LogitTransform` does not know.
    """
    transform = verified_transform(model)
    head = model.get_output_embeddings()
    top_k = routing_top_k(model.config)
    plain_forward = model.forward

    def forward(*args: Any, loss_request: LossRequest | None = None, **kwargs: Any) -> Any:
        if loss_request is None:
            return plain_forward(*args, **kwargs)
        found: list[tuple[FusedLossOutput, torch.Tensor]] = []

        def head_forward(hidden: torch.Tensor) -> torch.Tensor:
            parts = _loss(hidden, head, loss_request, transform)
            # Three dimensions, because model code slices and scales what it takes for logits.
            found.append((parts, parts.loss.reshape(1, 1, 1)))
            return found[0][1]

        if top_k is not None:
            kwargs["output_router_logits"] = True
        with head_replaced(head, head_forward):
            outputs = plain_forward(*args, **{**kwargs, "use_cache": False})
        parts, carried = found[0]
        # The loss goes on from the very tensor that left the head, so that hooks on the head's output (FSDP2)
        # see the gradient.
        loss, router = carried.reshape(()), None
        if top_k is not None and outputs.router_logits:
            balance, aux, kind = loss_request.router
            # Over the positions that carry the loss, so that micro-batches add up to the whole batch.
            router = router_losses(outputs.router_logits, loss_request.labels != IGNORE, top_k, kind)
            items = parts.num_valid if loss_request.num_items is None else loss_request.num_items
            loss = loss + (balance * router.load_balance + aux * router.aux) * (parts.num_valid / items)
        return LossOutput(loss=loss, parts=parts, router=router, hidden_states=outputs.hidden_states)

    model.forward = forward


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
