"""How each architecture's tensors and numbers are called in GGUF, and what has to be rearranged on the way.

The one idea: an architecture is a few rules from a runtime name to GGUF tensors; every rearrangement is one of
rows, so that codes and scales of a ternary weight go through it alike and stay exact.

Shapes: H heads, D head width, R rows, C columns, E experts.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from limbeck.errors import LimbeckError

#: transformers' model_type -> GGUF architecture.
ARCHITECTURES = {"llama": "llama", "qwen3": "qwen3", "qwen3_moe": "qwen3moe", "qwen3_next": "qwen3next"}

Rows = Callable[[torch.Tensor], torch.Tensor]  # `[..., R, x]` to the rows of one GGUF tensor


@dataclass(frozen=True)
class Target:
    """One GGUF tensor made of a runtime tensor.

    Attributes:
        name: in the file.
        rows: picks and orders rows; works on values, codes and scales alike.
        change: changes values, for tensors that are never ternary.
    """

    name: str
    rows: Rows = lambda tensor: tensor
    change: Callable[[torch.Tensor], torch.Tensor] | None = None


def architecture(config: Any) -> str:
    """The GGUF architecture of a transformers config.

    Raises:
        LimbeckError: stock llama.cpp has no architecture for it, or some setting of it is not known there.
    """
    if config.model_type not in ARCHITECTURES:
        raise LimbeckError(
            f"model_type {config.model_type} can not be exported to GGUF: the architectures are "
            f"{', '.join(ARCHITECTURES)}."
        )
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") not in ("default", "linear", "yarn"):
        raise LimbeckError(
            f"RoPE of type {rope['rope_type']} can not be exported to GGUF; default, linear and yarn can."
        )
    for key, plain in (("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu")):
        if getattr(config, key, plain) != plain:
            raise LimbeckError(f"{key} is {getattr(config, key)} and GGUF's {config.model_type} has {plain}.")
    if getattr(config, "use_sliding_window", False):
        raise LimbeckError("sliding-window attention can not be exported to GGUF for this architecture.")
    if config.model_type in ("qwen3_moe", "qwen3_next"):
        _check_experts(config)
    if config.model_type == "qwen3_next":
        _check_delta_net(config)
    return ARCHITECTURES[config.model_type]


def targets(config: Any, name: str) -> Sequence[Target]:
    """The GGUF tensors that a runtime tensor becomes; none for one that the file does not need.

    Raises:
        LimbeckError: GGUF has no place for it.
    """
    names = _name_map(config.model_type, config.num_hidden_layers)
    if name == "lm_head.weight" and config.tie_word_embeddings:
        return []
    if name.endswith("experts.gate_up_proj"):
        stem = name.removesuffix("gate_up_proj")
        half = config.moe_intermediate_size
        return [
            Target(f"{_lookup(names, f'{stem}gate_proj')}.weight", lambda t: t[..., :half, :]),
            Target(f"{_lookup(names, f'{stem}up_proj')}.weight", lambda t: t[..., half:, :]),
        ]
    if name.endswith("experts.down_proj"):
        return [Target(f"{_lookup(names, name)}.weight")]
    if "in_proj_qkvz" in name:
        layer = name.split(".")[2]
        qkv, z = _qkvz_rows(config)
        return [
            Target(f"blk.{layer}.attn_qkv.weight", lambda t: t[qkv]),
            Target(f"blk.{layer}.attn_gate.weight", lambda t: t[z]),
        ]
    if name.endswith("A_log"):
        return [Target(_lookup(names, name), change=lambda t: -t.float().exp())]
    if name.endswith("dt_bias"):
        return [Target(f"{_lookup(names, name.replace('dt_bias', 'dt_proj'))}.bias")]
    stem, _, suffix = name.rpartition(".")
    target = f"{_lookup(names, stem)}.{suffix}"
    if "conv1d" in name or "shared_expert_gate" in name:
        return [Target(target, change=torch.squeeze)]
    if config.model_type == "qwen3_next" and stem.endswith("norm") and not stem.endswith("linear_attn.norm"):
        return [Target(target, change=lambda t: t.float() + 1.0)]  # stored around 0 there
    if config.model_type == "llama" and stem.endswith(("q_proj", "k_proj")):
        heads = config.num_attention_heads if stem.endswith("q_proj") else config.num_key_value_heads
        return [Target(target, _interleaved(heads))]
    return [Target(target)]


@lru_cache(maxsize=4)
def _name_map(model_type: str, layers: int) -> Any:
    """The gguf package's map of tensor names, which is long to build and asked for once a tensor."""
    import gguf

    return gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, ARCHITECTURES[model_type].upper()), layers)


def _lookup(names: Any, key: str) -> str:
    found = names.get_name(key)
    if found is None:
        raise LimbeckError(f"GGUF has no tensor for {key}.")
    return str(found)


def _interleaved(heads: int) -> Rows:
    """Rows of q or k from rotated halves (transformers) to rotated pairs (llama.cpp's llama)."""

    def rows(tensor: torch.Tensor) -> torch.Tensor:
        count, rest = tensor.shape[0], tensor.shape[1:]
        return tensor.reshape(heads, 2, count // heads // 2, *rest).transpose(1, 2).reshape(count, *rest)

    return rows


def _qkvz_rows(config: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Row numbers of q, k, v (in that order) and of z, from `[q, k, v, z]` a key head to one part after the other."""
    heads, width = config.linear_num_key_heads, config.linear_key_head_dim
    values = config.linear_num_value_heads // heads * config.linear_value_head_dim
    numbers = torch.arange(heads * (2 * width + 2 * values)).reshape(heads, -1)
    q, k, v, z = torch.split(numbers, [width, width, values, values], dim=1)
    return torch.cat([q.flatten(), k.flatten(), v.flatten()]), z.flatten()


def add_hyperparameters(writer: Any, config: Any) -> None:
    """Write a config's numbers into a `gguf.GGUFWriter`."""
    import gguf

    rope = getattr(config, "rope_parameters", None) or {}
    heads, width = config.num_attention_heads, config.head_dim
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    writer.add_rope_dimension_count(_rotary_width(config, width))
    kind = rope.get("rope_type", "default")
    if kind != "default":
        if not rope.get("factor"):
            raise LimbeckError(f"rope_parameters has rope_type {kind} and no factor; GGUF needs it written out.")
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR if kind == "linear" else gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(rope["factor"]))
        if "original_max_position_embeddings" in rope:
            writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))
        if kind == "yarn":
            _add_yarn(writer, config, rope)
    if config.model_type in ("qwen3_moe", "qwen3_next"):
        _add_experts(writer, config)
    if config.model_type == "qwen3_next":
        _add_delta_net(writer, config)


def _rotary_width(config: Any, width: int) -> int:
    """Dimensions of a head that are rotated; of these architectures only Qwen3-Next rotates a part."""
    if config.model_type != "qwen3_next":
        return width
    rotated = int(width * (getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0))
    if rotated % 2:
        raise LimbeckError(
            f"partial_rotary_factor rotates {rotated} of {width} dimensions of a head, and llama.cpp rotates pairs. "
            "Choose a factor that gives an even number."
        )
    return rotated


def _add_yarn(writer: Any, config: Any, rope: dict[str, Any]) -> None:
    """YaRN's other settings; llama.cpp multiplies its own 1 + 0.1 ln(factor) by the attention factor in the file."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if not rope.get("truncate", True):
        raise LimbeckError("rope_parameters has truncate: false, for which GGUF has no key.")
    _, attention = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    writer.add_rope_scaling_attn_factors(float(attention) / (1.0 + 0.1 * math.log(float(rope["factor"]))))
    writer.add_rope_scaling_yarn_beta_fast(float(rope.get("beta_fast") or 32.0))
    writer.add_rope_scaling_yarn_beta_slow(float(rope.get("beta_slow") or 1.0))


def _check_experts(config: Any) -> None:
    if getattr(config, "mlp_only_layers", None) or getattr(config, "decoder_sparse_step", 1) != 1:
        raise LimbeckError("GGUF's architecture has experts in every layer; this student has dense layers between.")
    if not config.norm_topk_prob:
        raise LimbeckError("llama.cpp normalises the chosen experts' weights; set norm_topk_prob: true in the student.")


def _add_experts(writer: Any, config: Any) -> None:
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if config.model_type == "qwen3_next":
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)


def _check_delta_net(config: Any) -> None:
    key, value = config.linear_key_head_dim, config.linear_value_head_dim
    if key != value:
        raise LimbeckError(
            f"linear_key_head_dim is {key} and linear_value_head_dim {value}; llama.cpp has one width for both."
        )


def _add_delta_net(writer: Any, config: Any) -> None:
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
