"""A GGUF file, and what llama.cpp computes with it: forward passes in float64 that read nothing but the file.

They follow llama.cpp's graphs: its names, shapes and types of tensors, its numbers and their defaults, its RoPE and its
gated delta rule. No code of the exporter is shared: files are read and decoded by the gguf package, and Q2_0, which
gguf 0.19 does not know, by its layout here.

Shapes: T tokens, H heads, K key heads, D head width.
"""

import copy
import math
from functools import partial

import gguf
import numpy as np
import pytest
import torch

Q2_0 = 42
TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8, "tq1_0": 34, "tq2_0": 35, "q2_0": Q2_0}

# What the file holds.


class File:
    """Numbers and tensors of a GGUF file, and which of its tensors were asked for."""

    def __init__(self, path):
        with pytest.MonkeyPatch.context() as patch:
            if Q2_0 not in set(gguf.GGMLQuantizationType):
                number = int.__new__(gguf.GGMLQuantizationType, Q2_0)
                number._name_, number._value_ = "Q2_0", Q2_0
                patch.setattr(gguf.GGMLQuantizationType, "_missing_", lambda value: number if value == Q2_0 else None)
            patch.setitem(gguf.GGML_QUANT_SIZES, Q2_0, (64, 18))
            reader = gguf.GGUFReader(path)
        self.architecture = reader.fields["general.architecture"].contents()
        self.file_type = reader.fields["general.file_type"].contents()
        self.tokens = len(reader.fields["tokenizer.ggml.tokens"].data)
        prefix = f"{self.architecture}."
        self.numbers = {
            key.removeprefix(prefix): field.contents() for key, field in reader.fields.items() if key.startswith(prefix)
        }
        self.types = {tensor.name: int(tensor.tensor_type) for tensor in reader.tensors}
        self.values = {tensor.name: decoded(tensor) for tensor in reader.tensors}
        self.asked = set()

    def number(self, key, default=None):
        """A number of the architecture; one without a default has to be there."""
        return self.numbers[key] if default is None else self.numbers.get(key, default)

    def tensor(self, name, *shape):
        """A tensor, in the shape that llama.cpp makes it with; vectors, routers and convolutions are float32."""
        self.asked.add(name)
        assert tuple(self.values[name].shape) == shape, name
        exact = len(shape) == 1 or "ffn_gate_inp" in name or "conv1d" in name
        assert self.types[name] == TYPES["f32"] or not exact, name
        return self.values[name]

    def changed(self, values=None, numbers=None):
        """The same file with other tensors or numbers in it."""
        other = copy.copy(self)
        other.values, other.numbers = {**self.values, **(values or {})}, {**self.numbers, **(numbers or {})}
        return other


def decoded(tensor):
    """Values of a stored tensor in float64."""
    shape = [int(size) for size in reversed(tensor.shape)]
    if int(tensor.tensor_type) != Q2_0:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        return torch.from_numpy(np.array(values, dtype=np.float64)).reshape(shape)
    blocks = np.asarray(tensor.data).reshape(-1, 18)
    d = blocks[:, :2].copy().view("<f2").astype(np.float64)
    codes = np.zeros((len(blocks), 64))
    for weight in range(64):
        codes[:, weight] = (blocks[:, 2 + weight // 4] >> (2 * (weight % 4))) & 3
    return torch.from_numpy((codes - 1) * d).reshape(shape)


# llama.cpp's graphs.

IN_PAIRS = ("llama", "smollm3", "granite")  # whose RoPE turns neighbours (NORM); the others' i and i + n/2 (NEOX)
PARTLY_ROTATED = ("qwen3next", "phi3")
NORMS_BEHIND = ("gemma3", "olmo2")
NORMS_OF_HEADS = ("qwen3", "qwen3moe", "qwen3next", "gemma3")


def file_logits(file, ids):
    """Logits `[T, vocabulary]` of one sequence, from a file alone."""
    kind = file.architecture
    width, vocabulary, eps = file.number("embedding_length"), file.tokens, eps_of(file)
    second_norm = "post_attention_norm" if kind == "qwen3next" else "ffn_norm"
    x = file.tensor("token_embd.weight", vocabulary, width)[ids]
    x = x * (math.sqrt(width) if kind == "gemma3" else file.number("embedding_scale", 1.0))
    for layer in range(file.number("block_count")):

        def weight(name, *shape, blk=f"blk.{layer}."):
            return file.tensor(blk + name, *shape)

        def branch(x, mix, before, behind, weight=weight):
            inner = x if kind == "olmo2" else rms_norm(x, weight(f"{before}.weight", width), eps)
            inner = mix(inner)
            if kind in NORMS_BEHIND:
                inner = rms_norm(inner, weight(f"{behind}.weight", width), eps)
            return x + inner * file.number("residual_scale", 1.0)

        recurrent = kind == "qwen3next" and (layer + 1) % file.number("full_attention_interval", 4) != 0
        mix = partial(delta_net, file, weight) if recurrent else partial(attention, file, weight, layer)
        feed = partial(experts if kind in ("qwen3moe", "qwen3next") else dense, file, weight)
        x = branch(x, mix, "attn_norm", "post_attention_norm")
        x = branch(x, feed, second_norm, "post_ffw_norm")
    x = rms_norm(x, file.tensor("output_norm.weight", width), eps)
    head = "output.weight" if "output.weight" in file.values or kind == "olmo2" else "token_embd.weight"
    logits = x @ file.tensor(head, vocabulary, width).T / (file.number("logit_scale") if kind == "granite" else 1.0)
    bound = file.number("final_logit_softcapping", 0.0) if kind == "gemma3" else 0.0
    return (logits / bound).tanh() * bound if bound else logits


def eps_of(file):
    return file.number("attention.layer_norm_rms_epsilon")


def rms_norm(x, factors, eps):
    return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * factors


def silu(x):
    return x * x.sigmoid()


def gelu(x):
    return 0.5 * x * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())


def attention(file, weight, layer, x):
    """Causal attention with grouped keys and values; qwen3next's q holds, head by head, a query and a gate."""
    kind = file.architecture
    width, heads, groups = x.shape[-1], file.number("attention.head_count"), file.number("attention.head_count_kv")
    size = file.number("attention.key_length", width // heads)
    assert file.number("attention.value_length", width // heads) == size
    assert heads * size == width or kind not in ("qwen2", "phi3", "olmo2"), "their tensors are made that wide"
    gated = kind == "qwen3next"
    rows = [heads * size * (2 if gated else 1), groups * size, groups * size]
    if kind == "phi3":
        q, k, v = (x @ weight("attn_qkv.weight", sum(rows), width).T).split(rows, dim=-1)
    else:
        q, k, v = (x @ weight(f"attn_{n}.weight", r, width).T for n, r in zip("qkv", rows, strict=True))
    if kind == "qwen2":
        q, k, v = (part + weight(f"attn_{n}.bias", part.shape[-1]) for n, part in zip("qkv", (q, k, v), strict=True))
    if kind == "olmo2":
        q, k = (
            rms_norm(y, weight(f"attn_{n}_norm.weight", y.shape[-1]), eps_of(file))
            for n, y in zip("qk", (q, k), strict=True)
        )
    q, k, v = q.reshape(len(x), heads, -1), k.reshape(-1, groups, size), v.reshape(-1, groups, size)
    q, gate = q[..., :size], q[..., size:]
    if kind in NORMS_OF_HEADS:
        q, k = (
            rms_norm(y, weight(f"attn_{n}_norm.weight", size), eps_of(file)) for n, y in zip("qk", (q, k), strict=True)
        )
    if kind != "smollm3" or (layer + 1) % 4 != 0:
        q, k = rope(file, q, slides(file, layer)), rope(file, k, slides(file, layer))
    scale = file.number("attention.scale", 0.0) or 1 / math.sqrt(size)
    if kind == "gemma3" and file.number("block_count") == 62:  # taken for the 27B model
        scale = 1 / math.sqrt(width // heads)
    mixed = torch.empty_like(q)
    for head in range(heads):
        group = head // (heads // groups)
        scores = q[:, head] @ k[:, group].T * scale
        hidden = torch.ones_like(scores).triu(1).bool()
        if slides(file, layer):
            hidden |= torch.ones_like(scores).tril(-file.number("attention.sliding_window")).bool()
        mixed[:, head] = scores.masked_fill(hidden, -math.inf).softmax(dim=-1) @ v[:, group]
    if gated:
        mixed = mixed * gate.sigmoid()
    return mixed.reshape(len(x), -1) @ weight("attn_output.weight", width, heads * size).T


def normed(file, weight, q, k):
    """Queries and keys through their norms: over the whole width, or head by head."""
    factors = (weight(f"attn_{name}_norm.weight", part.shape[-1]) for name, part in (("q", q), ("k", k)))
    return (rms_norm(part, factor, eps_of(file)) for part, factor in zip((q, k), factors, strict=True))


def slides(file, layer):
    """Whether a layer has a sliding window; of phi3's llama.cpp takes no notice."""
    if file.architecture != "gemma3" or not file.number("attention.sliding_window", 0):
        return False
    return file.number("attention.sliding_window_pattern")[layer]


def rope(file, x, sliding=False):
    """Rotated `[T, H, D]`; layers that slide have a base of their own and no scaling."""
    size = x.shape[-1]
    count = file.number("rope.dimension_count", size)
    assert count == size or (file.architecture in PARTLY_ROTATED and count % 2 == 0)
    base = file.number("rope.freq_base", 10000.0)
    kind, factor = file.number("rope.scaling.type", "none"), file.number("rope.scaling.factor", 1.0)
    if sliding:
        base, kind, factor = file.number("rope.freq_base_swa", 10000.0), "none", 1.0
    scale = 1.0
    if kind == "yarn":
        scale = (1 + 0.1 * math.log(factor)) * file.number("rope.scaling.attn_factor", 1.0)
        trained = file.number("rope.scaling.original_context_length", file.number("context_length"))
        turns = 32.0, 1.0  # whatever the file says
        fast, slow = (count * math.log(trained / (turn * 2 * math.pi)) / (2 * math.log(base)) for turn in turns)
        low, high = max(0, math.floor(fast)), min(count - 1, math.ceil(slow))
    result = x.clone()
    for pair in range(count // 2):
        plain = torch.arange(len(x), dtype=torch.float64)[:, None] * base ** (-2 * pair / count)
        if kind == "yarn":
            kept = 1 - min(1, max(0, (pair - low) / max(0.001, high - low)))
            angle = plain / factor * (1 - kept) + plain * kept
        else:
            angle = plain / factor if kind == "linear" else plain
        one, two = (2 * pair, 2 * pair + 1) if file.architecture in IN_PAIRS else (pair, pair + count // 2)
        result[..., one] = (x[..., one] * angle.cos() - x[..., two] * angle.sin()) * scale
        result[..., two] = (x[..., one] * angle.sin() + x[..., two] * angle.cos()) * scale
    return result


def delta_net(file, weight, x):
    """Gated delta rule, one token after the other; a key head serves the value heads that stand next to each other."""
    width, size = x.shape[-1], file.number("ssm.state_size")
    keys, heads, kernel = (file.number(f"ssm.{key}") for key in ("group_count", "time_step_rank", "conv_kernel"))
    assert file.number("ssm.inner_size") == heads * size
    channels = (2 * keys + heads) * size
    mixed = x @ weight("attn_qkv.weight", channels, width).T
    z = (x @ weight("attn_gate.weight", heads * size, width).T).reshape(-1, heads, size)
    ba = (x @ weight("ssm_ba.weight", 2 * heads, width).T).reshape(-1, keys, 2, heads // keys)
    beta = ba[:, :, 0].reshape(-1, heads).sigmoid()
    alpha = ba[:, :, 1].reshape(-1, heads) + weight("ssm_dt.bias", heads)
    decay = (weight("ssm_a", heads) * alpha.exp().log1p()).exp()
    convolution = weight("ssm_conv1d.weight", channels, kernel)
    padded = torch.cat([mixed.new_zeros(kernel - 1, channels), mixed])
    mixed = silu(sum(padded[step : step + len(x)] * convolution[:, step] for step in range(kernel)))
    q, k, v = (part.reshape(len(x), -1, size) for part in mixed.split([keys * size, keys * size, heads * size], dim=1))
    q, k = (part / part.norm(dim=-1, keepdim=True).clamp_min(eps_of(file)) for part in (q, k))
    q, k = (part.repeat_interleave(heads // keys, dim=1) for part in (q, k))
    out, state = torch.empty_like(v), x.new_zeros(heads, size, size)  # from keys to values
    for t in range(len(x)):
        state = state * decay[t, :, None, None]
        known = (k[t, :, :, None] * state).sum(dim=1)
        state = state + k[t, :, :, None] * ((v[t] - known) * beta[t, :, None])[:, None, :]
        out[t] = (q[t, :, :, None] * state).sum(dim=1) / math.sqrt(size)
    out = rms_norm(out, weight("ssm_norm.weight", size), eps_of(file)) * silu(z)
    return out.reshape(len(x), -1) @ weight("ssm_out.weight", width, heads * size).T


def dense(file, weight, x):
    if file.architecture == "phi3":
        width, inner = x.shape[-1], file.number("feed_forward_length")
        gate, up = (x @ weight("ffn_up.weight", 2 * inner, width).T).split(inner, dim=-1)
        return (silu(gate) * up) @ weight("ffn_down.weight", width, inner).T
    return gated_layer(
        weight, x, "", file.number("feed_forward_length"), gelu if file.architecture == "gemma3" else silu
    )


def gated_layer(weight, x, suffix, inner, act=silu):
    width = x.shape[-1]
    gate = x @ weight(f"ffn_gate{suffix}.weight", inner, width).T
    up = x @ weight(f"ffn_up{suffix}.weight", inner, width).T
    return (act(gate) * up) @ weight(f"ffn_down{suffix}.weight", width, inner).T


def experts(file, weight, x):
    """The best experts by a softmax over all, their weights summing to 1; qwen3next adds a shared one with a gate."""
    width, inner = x.shape[-1], file.number("expert_feed_forward_length")
    count, used = file.number("expert_count"), file.number("expert_used_count")
    gates, ups = (weight(f"ffn_{part}_exps.weight", count, inner, width) for part in ("gate", "up"))
    downs = weight("ffn_down_exps.weight", count, width, inner)
    result = torch.zeros_like(x)
    for t, chances in enumerate((x @ weight("ffn_gate_inp.weight", count, width).T).softmax(dim=-1)):
        chosen = chances.argsort(descending=True)[:used]
        for expert in chosen:
            inside = silu(gates[expert] @ x[t]) * (ups[expert] @ x[t])
            result[t] += downs[expert] @ inside * chances[expert] / chances[chosen].sum()
    if file.architecture == "qwen3next":
        shared = gated_layer(weight, x, "_shexp", file.number("expert_shared_feed_forward_length"))
        result += shared * (x @ weight("ffn_gate_inp_shexp.weight", width)).sigmoid()[:, None]
    return result
