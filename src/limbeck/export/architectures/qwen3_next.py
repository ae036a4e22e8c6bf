"""Qwen3-Next: gated delta nets between layers of full attention, a shared expert, norms around 0."""

from collections.abc import Sequence
from typing import Any

import torch

from limbeck.errors import LimbeckError
from limbeck.export.architectures.base import PartlyRotated, Target, WithExperts
from limbeck.registry import ARCHITECTURES


@ARCHITECTURES.register("qwen3_next")
class Qwen3Next(PartlyRotated, WithExperts):
    """Qwen3-Next."""

    name = "qwen3next"

    def check(self) -> None:
        """One width for keys and values of linear attention."""
        super().check()
        key, value = self.config.linear_key_head_dim, self.config.linear_value_head_dim
        if key != value:
            raise LimbeckError(
                f"linear_key_head_dim is {key} and linear_value_head_dim {value}; llama.cpp has one width for both."
            )

    def targets(self, name: str) -> Sequence[Target]:
        """What of the delta nets is split, squeezed or stored in another form."""
        stem, _, suffix = name.rpartition(".")
        if "in_proj_qkvz" in name:
            layer = name.split(".")[2]
            qkv, z = self._qkvz_rows()
            return [
                Target(f"blk.{layer}.attn_qkv.weight", lambda t: t[qkv]),
                Target(f"blk.{layer}.attn_gate.weight", lambda t: t[z]),
            ]
        if name.endswith("A_log"):
            return [Target(self.lookup(name), change=lambda t: -t.float().exp())]
        if name.endswith("dt_bias"):
            return [Target(f"{self.lookup(name.replace('dt_bias', 'dt_proj'))}.bias")]
        if "conv1d" in name or "shared_expert_gate" in name:
            return [Target(f"{self.lookup(stem)}.{suffix}", change=torch.squeeze)]
        if stem.endswith("norm") and not stem.endswith("linear_attn.norm"):
            return [Target(f"{self.lookup(stem)}.{suffix}", change=lambda t: t.float() + 1.0)]  # stored around 0 here
        return super().targets(name)

    def stays_float32(self, name: str, shape: Sequence[int]) -> bool:
        """Convolutions and the shared expert's gate too."""
        return "conv1d" in name or "shared_expert_gate" in name or super().stays_float32(name, shape)

    def add_numbers(self, writer: Any) -> None:
        """The shared expert, the delta nets, and how often full attention comes."""
        super().add_numbers(writer)
        config = self.config
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
        writer.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
        writer.add_ssm_state_size(config.linear_key_head_dim)
        writer.add_ssm_group_count(config.linear_num_key_heads)
        writer.add_ssm_time_step_rank(config.linear_num_value_heads)
        writer.add_ssm_inner_size(config.linear_value_head_dim * config.linear_num_value_heads)
        full = [number for number, kind in enumerate(config.layer_types, start=1) if kind == "full_attention"]
        interval = full[0] if full else 0
        if not full or full != list(range(interval, config.num_hidden_layers + 1, interval)):
            raise LimbeckError(
                "llama.cpp wants full attention in every n-th layer; layer_types has it in "
                f"{full} of {config.num_hidden_layers}."
            )
        writer.add_full_attention_interval(interval)

    def _qkvz_rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Row numbers of q, k, v (in that order) and of z, from `[q, k, v, z]` a key head to one part after another."""
        config = self.config
        heads, width = config.linear_num_key_heads, config.linear_key_head_dim
        values = config.linear_num_value_heads // heads * config.linear_value_head_dim
        numbers = torch.arange(heads * (2 * width + 2 * values)).reshape(heads, -1)
        q, k, v, z = torch.split(numbers, [width, width, values, values], dim=1)
        return torch.cat([q.flatten(), k.flatten(), v.flatten()]), z.flatten()
