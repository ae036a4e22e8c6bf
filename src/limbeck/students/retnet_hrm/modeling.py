"""RetNet-HRM: retention layers in two stacks that take turns, as a causal LM of transformers.

    x = √D · E[ids],   z_H = x,   z_L = 0
    M segments of: for h < H:  for l < L:  z_L = f_L(z_L + z_H + x)      (without gradient, but for the last ones)
                               z_H = f_H(z_H + z_L)
    logits = W_out z_H

The one idea: every application of a layer to a token is a retention of its own over what that application was given
for the tokens before, so training runs all positions at once and decoding carries one state for each application,
whatever the length of the text. With H = 1 and L = 0 this is a plain RetNet.

Each segment is trained on (its states are detached before the next one starts). With `halting`, a head says after
each segment, token by token, whether another one is needed; a token that has halted keeps its z_H and z_L and passes
the stacks unchanged, so later tokens still find keys and values of it in every state.

Source: RetNet (arXiv 2307.08621), HRM (arXiv 2506.21734), Titans (arXiv 2501.00663).
Shapes: B rows, T positions, D width, V vocabulary.
"""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep

from limbeck.students.retnet_hrm.cache import RecurrentCache
from limbeck.students.retnet_hrm.chunks import ChunkLayout
from limbeck.students.retnet_hrm.configuration import RetNetHRMConfig
from limbeck.students.retnet_hrm.gpu import kernel_serves
from limbeck.students.retnet_hrm.layers import (
    MultiScaleRetention,
    RetNetStack,
    RowContext,
    rotary,
    xavier,
)
from limbeck.students.retnet_hrm.memory import RATE_BIASES, RateGates, TitansMemory
from limbeck.students.retnet_hrm.retention import Decays, Places, document_borders

Tensor = torch.Tensor
_HALTING_BIAS = -5.0  # at first nothing halts


class HaltingHead(nn.Module):
    """The logit that a token needs no further segment."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.full((1,), _HALTING_BIAS))

    def forward(self, hidden: Tensor) -> Tensor:
        """`[..., D]` to `[...]`, in float32 at least."""
        exact = torch.promote_types(hidden.dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            return hidden.to(exact) @ self.weight.to(exact) + self.bias.to(exact)


@dataclass
class RetNetHRMOutput(BaseModelOutputWithPast):
    """What the model's body gives.

    Attributes:
        segments: z_H `[B, T, D]` after each segment, the last one being `last_hidden_state`; in training only.
        segments_used: `[B, T]` segments until each token halted, where the model can halt.
    """

    segments: tuple[Tensor, ...] | None = None
    segments_used: Tensor | None = None


class RetNetHRMPreTrainedModel(PreTrainedModel):
    """What both classes share: initialisation and what transformers may do with them."""

    config: RetNetHRMConfig
    config_class = RetNetHRMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("RetNetLayer",)
    _skip_keys_device_placement = ("past_key_values",)
    _is_stateful = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MultiScaleRetention):
            for projection in (module.q_proj, module.k_proj, module.v_proj, module.g_proj):
                init.normal_(projection.weight, std=xavier(projection, 2.0**-2.5))
            init.normal_(module.o_proj.weight, std=xavier(module.o_proj, 0.5))
        elif isinstance(module, TitansMemory):
            init.zeros_(module.o_proj.weight)
        elif isinstance(module, RateGates):
            init.zeros_(module.weight)
            init.copy_(module.bias, torch.tensor(RATE_BIASES).repeat_interleave(len(module.bias) // 3))
        elif isinstance(module, HaltingHead):
            init.zeros_(module.weight)
            init.constant_(module.bias, _HALTING_BIAS)


class RetNetHRMModel(RetNetHRMPreTrainedModel):
    """The body: embedding and cycles."""

    def __init__(self, config: RetNetHRMConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.high = RetNetStack(config)
        self.low = RetNetStack(config) if config.L_cycles else None
        self.memory = TitansMemory(config) if config.memory else None
        self.halting = HaltingHead(config.hidden_size) if config.halting else None
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: RecurrentCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> RetNetHRMOutput:
        """The hidden states of rows of tokens.

        Args:
            input_ids: `[B, T]`.
            attention_mask: `[B, T]`, or as long as the text so far; 0 for padding.
            position_ids: `[1 or B, T]`; a document begins at each 0, and nothing crosses its border.
            past_key_values: what an earlier call carried.
            inputs_embeds: `[B, T, D]` instead of `input_ids`.
            use_cache: carry states; default the config's, and never in training.
            output_hidden_states: give x and z_H after each application of the H stack.
            kwargs: arguments of other architectures; not used.

        Raises:
            ValueError: neither or both of `input_ids` and `inputs_embeds` are given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        x = x * (self.config.embedding_scale or 1.0)
        keep = self.config.use_cache and not self.training if use_cache is None else use_cache
        if self.training and self.gradient_checkpointing:
            keep, past_key_values = False, None  # recomputing would read states that were written already
        cache = past_key_values if past_key_values is not None else RecurrentCache() if keep else None
        context = self._context(x, attention_mask, position_ids, cache)
        shown: list[Tensor] | None = [x] if output_hidden_states else None
        z_high, z_low, ends = x, torch.zeros_like(x), []
        used = torch.ones(x.shape[:2], dtype=torch.long, device=x.device)
        for number in range(self.config.segments):
            z_high, z_low = self._segment(number, x, z_high, z_low, context, shown)
            ends.append(z_high)
            if number + 1 == self.config.segments:
                break
            if self.training:
                z_high, z_low = z_high.detach(), z_low.detach()
            elif self.halting is not None:
                halted = (self.halting(z_high) > 0.0).unsqueeze(-1)
                halted = halted if context.halted is None else halted | context.halted
                used = used + ~halted.squeeze(-1)
                context = replace(context, halted=halted, finished=bool(halted.all()))
        if cache is not None:
            cache.seen += x.shape[1]
        return RetNetHRMOutput(
            last_hidden_state=z_high,
            past_key_values=cache,
            hidden_states=None if shown is None else tuple(shown),
            segments=tuple(ends) if self.training else None,
            segments_used=used if self.halting is not None else None,
        )

    def _context(
        self, x: Tensor, mask: Tensor | None, position_ids: Tensor | None, cache: RecurrentCache | None
    ) -> RowContext:
        config, length = self.config, x.shape[1]
        before = 0 if cache is None else cache.seen
        places = Places.of(length, before, position_ids, mask, x.device)
        borders = None
        if cache is None and mask is None and kernel_serves(x):
            rows = places.positions.expand(x.shape[0], -1).clone()
            borders = document_borders(rows)
        decays = Decays.of(places, config.num_attention_heads, config.chunk_size, x.dtype, borders)
        layout = None if self.memory is None else ChunkLayout.of(places, x.shape[0], config.memory_chunk)
        exact = torch.promote_types(x.dtype, torch.float32)
        return RowContext(*rotary(places.positions, config.key_width, exact), decays, layout, cache)

    def _segment(
        self,
        number: int,
        x: Tensor,
        z_high: Tensor,
        z_low: Tensor,
        context: RowContext,
        shown: list[Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        """All cycles once: z_H and z_L after them."""
        config = self.config
        for high in range(config.H_cycles):
            for low in range(config.L_cycles):
                trained = low >= config.L_cycles - config.trained_cycles(high)
                with nullcontext() if trained else torch.no_grad():
                    assert self.low is not None
                    z_low = _unless_halted(self.low(z_low + z_high + x, context.at(number, high, low)), z_low, context)
            u = z_high + z_low
            if self.memory is not None and high + 1 == config.H_cycles:
                u = _unless_halted(self.memory(u, context, (number,)), u, context)
            z_high = _unless_halted(self.high(u, context.at(number, high, config.L_cycles)), z_high, context)
            if shown is not None:
                shown.append(z_high)
        return z_high, z_low


def _unless_halted(new: Tensor, old: Tensor, context: RowContext) -> Tensor:
    """The new states, but the old ones of tokens that have halted; a stack may lie on another device."""
    new = new.to(old.device)
    return new if context.halted is None else torch.where(context.halted, old, new)


class RetNetHRMForCausalLM(RetNetHRMPreTrainedModel, GenerationMixin):
    """RetNet-HRM with an output embedding."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (transformers' attribute)

    def __init__(self, config: RetNetHRMConfig) -> None:
        super().__init__(config)
        self.model = RetNetHRMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """The body makes its own cache."""
        return False

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any) -> None:
        """One for whatever `generate` does before the first forward, such as reading the prompt in parts."""
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = RecurrentCache()

    def halting_logits(self, hidden: Tensor) -> Tensor | None:
        """`[..., D]` to `[...]`: the logit that no further segment is needed; None where the model cannot halt."""
        return None if self.model.halting is None else self.model.halting(hidden)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: RecurrentCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits `[B, T, V]` of rows of tokens; arguments as of `RetNetHRMModel`.

        In training the head is applied after each segment, and the loss of `labels` is the mean over segments.
        """
        outputs = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_hidden_states,
        )
        ends = outputs.segments or (outputs.last_hidden_state,)
        every = [self.lm_head(slice_logits_to_keep(hidden, logits_to_keep)) for hidden in ends]
        loss = None
        if labels is not None:
            of_each = [
                self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
                for logits in every
            ]
            loss = torch.stack(of_each).mean()
            if self.model.halting is not None:  # is taught by limbeck's own objective; DDP asks for a gradient
                loss = loss + 0.0 * self.model.halting(outputs.last_hidden_state).sum()
        return CausalLMOutputWithPast(
            loss=loss,
            logits=every[-1],
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )
