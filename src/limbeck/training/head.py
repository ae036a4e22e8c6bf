"""Objectives inside any Hugging Face causal LM's own forward.

The one idea: while a loss is asked for, the output embedding's forward evaluates the objectives on the hidden states it
is given, its own weight and what the routers below it decided, and hands the scalar up through the model. So the head
is reached inside the wrapped model (DDP's hooks run, FSDP2 has the weight gathered), no model code is copied, and no
[B, T, V] logits exist. What the model does to logits after the head (scale, soft-cap) is read from its config and
verified once against the model's own logits.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_outputs import CausalLMOutput

from limbeck.losses.objective import Batch, Objectives, Outputs
from limbeck.losses.router import RouterTap
from limbeck.models import head_replaced, verified_transform


@dataclass(frozen=True)
class LossRequest:
    """What the forward needs to return a loss.

    Attributes:
        batch: labels and targets.
        objectives: their weighted sum is the loss.
        exact: in a form that can be differentiated twice; nothing is measured.
    """

    batch: Batch
    objectives: Objectives
    exact: bool = False


@dataclass
class LossOutput(CausalLMOutput):
    """A causal LM's output that carries the loss and what the objectives measured instead of logits."""

    metrics: Mapping[str, torch.Tensor] | None = None


def attach_objectives(model: Any) -> None:
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
        found: list[torch.Tensor] = []
        measured: list[Mapping[str, torch.Tensor]] = []
        batch, objectives = loss_request.batch, loss_request.objectives

        def head_forward(hidden: torch.Tensor) -> torch.Tensor:
            outputs = Outputs(hidden, head, transform, tap.routings(), tap.problem, model)
            if loss_request.exact:
                loss = objectives.exact(outputs, batch)
            else:
                loss, metrics = objectives(outputs, batch)
                measured.append(metrics)
            # Three dimensions, because model code slices and scales what it takes for logits.
            found.append(loss.reshape(1, 1, 1))
            return found[0]

        with tap.recording(), head_replaced(head, head_forward):
            outputs = plain_forward(*args, **{**kwargs, "use_cache": False})
        # The loss goes on from the very tensors that left the head, so that hooks on the head's output (FSDP2)
        # see the gradient. A model that calls its head after each of several segments is trained on their mean.
        loss = found[0].reshape(()) if len(found) == 1 else torch.cat(found).mean()
        metrics = measured[0] if len(measured) == 1 else _means(measured)
        return LossOutput(loss=loss, metrics=metrics, hidden_states=outputs.hidden_states)

    model.forward = forward


def _means(measured: list[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    names = measured[0] if measured else ()
    return {name: torch.stack([part[name].float() for part in measured]).mean(dim=0) for name in names}
